_jaxdistill() {
    # Bash splits words at = and :, so the line is read anew.
    local line=${COMP_LINE:0:COMP_POINT} typed before kept='' mark
    typed=${line##*[[:space:]]}
    read -r -a before <<<"${line%"$typed"}"
    case $typed in
        --workdir=* | --config=*/*) mapfile -t COMPREPLY < <(compgen -f -- "${typed#*=}") ;;
        *) mapfile -t COMPREPLY < <(_jaxdistill_matches "$typed" "${before[@]:1}") ;;
    esac
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[.=:,] ]]; then
        compopt -o nospace 2>/dev/null
    fi
    case $typed in
        --workdir=* | --config=*/*) compopt -o filenames 2>/dev/null ;;
        *)
            # It puts in only what follows the last of them.
            for mark in = :; do
                if [[ $COMP_WORDBREAKS == *$mark* && $typed == *$mark* ]]; then
                    line=${typed%"$mark"*}$mark
                    [[ ${#line} -le ${#kept} ]] || kept=$line
                fi
            done
            COMPREPLY=("${COMPREPLY[@]#"$kept"}")
            ;;
    esac
}
complete -F _jaxdistill jaxdistill
