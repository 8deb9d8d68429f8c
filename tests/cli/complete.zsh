# Prints what zsh offers for the line in $1, one word a line.
zmodload zsh/zpty || exit 77
# Whatever happens, it ends.
(sleep 30; kill $$) > /dev/null 2>&1 &!
zpty shell zsh -f -i
setup='
PROMPT=
autoload compinit && compinit -u -D
source ./script
bindkey "^M" undefined
bindkey "^J" undefined
bindkey "^I" complete-word
begin() { echo -E - $'"'\0'"'; }
compprefuncs=(begin)
comppostfuncs=(begin exit)
zstyle ":completion:*" list-grouped false
zstyle ":completion:*" insert-tab false
compadd() {
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then
        builtin compadd "$@"
        return $?
    fi
    typeset -a __hits
    builtin compadd -A __hits "$@"
    [[ -n $__hits ]] || return
    local word
    for word in $__hits; do echo -E - $word; done
}
echo ready
'
zpty -w shell "source /dev/stdin <<'SETUP'
$setup
SETUP"
zpty -r -m shell _ '*ready*'
zpty -w -n shell "$1"$'\t'
integer depth=0
while zpty -r shell line; do
    if [[ $line == *$'\0'* ]]; then
        (( depth++ )) && break
    elif (( depth )); then
        print -r -- $line
    fi
done
