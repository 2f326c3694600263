# Prints what the word that is typed may become, up to its next . = : or comma. The first argument
# is that word as far as it is typed, the others are those before it. For bash and zsh.
_jaxdistill_matches() {
    [ -z "$ZSH_VERSION" ] || emulate -L sh
    local typed=$1 config='' first='' word words='' head='' rest next
    shift
    first=${1-}
    for word; do
        case $word in --config=*) config=${word#--config=} config=${config%%:*} ;; esac
    done
    case "$first $typed" in
        list\ *) return ;;
        describe\ *:* | *\ --config=*:*)
            config=${typed#--config=} config=${config%%:*}
            head=${typed%"${typed##*[:,]}"}
            words=$(_jaxdistill_list "argument $config")
            ;;
        describe\ * | completion\ *) words=$(_jaxdistill_list "$first") ;;
        *)
            words="$(_jaxdistill_list flags) $(_jaxdistill_list "settings $config")"
            [ -n "$first" ] || words="list describe completion $words"
            ;;
    esac
    for word in $words; do
        word=$head$word
        case $word in "$typed"*) ;; *) continue ;; esac
        rest=${word#"$typed"}
        next=${rest%%[.=:,]*}
        if [ "$next" != "$rest" ]; then
            rest=${rest#"$next"}
            next=$next${rest%"${rest#?}"}
        fi
        printf '%s\n' "$typed$next"
    done | sort -u
}
