_jaxdistill() {
    local -a found open whole
    case $PREFIX in
        --workdir=*) compset -P '*='; _files -/; return ;;
        --config=*/*) compset -P '*='; _files; return ;;
    esac
    found=(${(f)"$(_jaxdistill_matches "$PREFIX" ${words[2,CURRENT-1]})"})
    open=(${(M)found:#*[.=:,]})
    whole=(${found:#*[.=:,]})
    compadd -S '' -a open
    compadd -a whole
}
if [ "${funcstack[1]-}" = _jaxdistill ]; then
    _jaxdistill # read from a folder of $fpath when it is first wanted
else
    compdef _jaxdistill jaxdistill
fi
