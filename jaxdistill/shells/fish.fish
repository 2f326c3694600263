# What the word that is typed may become, up to its next . = : or comma.
function _jaxdistill_matches
    set -l typed (commandline -ct)
    set -l before (commandline -opc)
    set -l config ''
    for word in $before
        string match -q -- '--config=*' $word
        and set config (string replace -r -- '^--config=([^:]*).*' '$1' $word)
    end
    set -l first "$before[2]"
    set -l head ''
    set -l words
    switch "$first $typed"
        case 'list *'
            return
        case 'describe *:*' '* --config=*:*'
            set config (string replace -r -- '^(?:--config=)?([^:]*).*' '$1' $typed)
            set head (string replace -r -- '[^:,]*$' '' $typed)
            set words (_jaxdistill_list "argument $config")
        case 'describe *' 'completion *'
            set words (_jaxdistill_list $first)
        case '*'
            set words (_jaxdistill_list flags) (_jaxdistill_list "settings $config")
            test -n "$first"; or set -p words list describe completion
    end
    set -l start (string length -- "$typed")
    for word in $head$words
        test (string sub -l $start -- "$word") = "$typed"; or continue
        set -l rest (string sub -s (math $start + 1) -- "$word")
        echo -- $typed(string replace -r -- '^([^.=:,]*[.=:,]?).*' '$1' "$rest")
    end | sort -u
end
complete -c jaxdistill -f -a '(_jaxdistill_matches)'
complete -c jaxdistill -l workdir -r -f -a '(__fish_complete_directories)'
