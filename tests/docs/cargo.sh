#!/bin/sh
# `cargo` as the commands of the guides find it: programs are those of the build for tests, made where the
# repository ($ROOT) is and run where the command is, with fewer steps. $REAL_CARGO and $REAL_LIBTORCH are those of the build.
set -eu
# A block may name another one.
export LIBTORCH="$REAL_LIBTORCH"

# Runs a program of a package.
program() {
    exec "$REAL_CARGO" run --quiet --manifest-path "$ROOT/Cargo.toml" "$@"
}

case "$*" in
test | "xtask test") exit ;; # This is one of those tests.
"xtask setup"*) shift && program --package xtask -- "$@" ;;
"xtask demo"*) shift 2 && set -- --example demo -- "$@" ;;
"+nightly fuzz run --sanitizer none "*) test -e "$ROOT/fuzz/fuzz_targets/$6.rs" && exit ;; # Needs that compiler.
"bench --bench "*)
    name=$3 && shift 3 && [ "${1-}" != -- ] || shift
    # Benches run where the repository is; their figures are none for the guide.
    for word; do
        shift && case $word in docs/*) word=$PWD/${word##*/} ;; esac
        set -- "$@" "$word"
    done
    exec "$REAL_CARGO" test --quiet --manifest-path "$ROOT/Cargo.toml" --bench "$name" -- --trial "$@"
    ;;
"run --release --example "*) shift 2 ;;
"run --example "*) shift ;;
*) echo "cargo $*: not known to tests/docs/cargo.sh" >&2 && exit 1 ;;
esac

# --example NAME [-- ARGS]
name=$2 && shift 2 && [ "${1-}" != -- ] || shift
case $name in
demo)
    # Two texts have it; once is enough.
    [ ! -e "$0.demo" ] || exit 0
    : >"$0.demo" && set -- "$@" --quick --out "$PWD/demo"
    ;;
finetune_llm | finetune_diffusion) set -- "$@" --steps 2 --every 1 ;;
charts) set -- "$@" --docs "$PWD/docs" ;;
esac
program --example "$name" -- "$@"
