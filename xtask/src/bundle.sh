#!/bin/sh
# Runs the tests of tch-peft that lie beside this script, and sums up. No Rust
# is needed: a torch that has CUDA, its Python, and the driver.

usage() {
    cat <<'TEXT'
Usage: ./run [options] [NAME...] [-- ARGS]

  NAME...          Test programs to run, of bin/tests; all unless named
  -- ARGS          For each test program, such as the name of a test
  --device DEVICE  Where tests put tensors that can be anywhere: cuda (the usual),
                   cpu, or stand-in: the CPU in the place of a GPU, where
                   `cargo xtask test --device stand-in` has built it
  --python PYTHON  A Python that has torch; python3 unless named. Where it has
                   peft too, tests also compare with the Python libraries
  --bench          Run the GPU's bench instead; ARGS go to it
  -h, --help       This text

Each program's output goes to logs/NAME.log. The exit status is 0 if all passed.
TEXT
}

here=$(CDPATH='' cd "$(dirname "$0")" && pwd) || exit 2
device=cuda python=python3 bench=no names=
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2 && shift 2 || exit 2 ;;
    --python) python=$2 && shift 2 || exit 2 ;;
    --bench) bench=yes && shift ;;
    -h | --help) usage && exit ;;
    --) shift && break ;;
    -*) echo "error: no option $1; --help lists them" >&2 && exit 2 ;;
    *) names="$names $1" && shift ;;
    esac
done

find_folder='from importlib.util import find_spec
spec = find_spec("torch")
print(spec.submodule_search_locations[0] if spec else "")'
torch=$("$python" -c "$find_folder") || exit 2
if [ -z "$torch" ]; then
    echo "error: $python has no torch; name one that has with --python" >&2
    exit 2
fi
LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
TCH_PEFT_ROOT=$here
TCH_PEFT_TEST_DEVICE=$device
# Tests that compare with the peers are told that there are none.
TCH_PEFT_PYTHON=
if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("peft") is None)'; then
    TCH_PEFT_PYTHON=$(command -v "$python")
fi
preload=
if [ "$device" = stand-in ]; then
    TCH_PEFT_TEST_DEVICE=cuda
    preload=LD_PRELOAD=$here/bin/standin.so
fi
# Results are compared with f32 arithmetic, and with those of a second run: no
# TF32 in cuDNN's convolutions, and no cuBLAS that sums in another order each time.
NVIDIA_TF32_OVERRIDE=0
CUBLAS_WORKSPACE_CONFIG=:4096:8
export LD_LIBRARY_PATH TCH_PEFT_ROOT TCH_PEFT_TEST_DEVICE TCH_PEFT_PYTHON
export NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG
echo "torch   $torch"
echo "device  $device"
echo "peers   ${TCH_PEFT_PYTHON:-OFF: $python has no peft, nothing is compared with it}"
cd "$here" || exit 2

if [ $bench = yes ]; then
    unset NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG
    exec bin/benches/cuda --device "$device" "$@"
fi

mkdir -p logs tmp
passed=0 failed=0 skipped=0 broken=
for name in ${names:-$(ls bin/tests)}; do
    log=logs/$name.log
    env $preload "bin/tests/$name" "$@" >"$log" 2>&1
    status=$?
    # The last such line is that of the program; those before are of processes that it started.
    line=$(grep '^test result: ' "$log" | tail -n 1)
    count() { echo "$line" | sed -n "s/.* \([0-9][0-9]*\) $1.*/\1/p"; }
    passed=$((passed + $(count passed || true) + 0))
    failed=$((failed + $(count failed || true) + 0))
    skipped=$((skipped + $(count ignored || true) + 0))
    if [ $status -eq 0 ] && [ -n "$line" ]; then
        echo "ok      $name: ${line#test result: ok. }"
    else
        echo "FAILED  $name (exit status $status): $log"
        broken="$broken $name"
    fi
done
echo "$passed passed, $failed failed, $skipped skipped, on $device"
if [ -n "$broken" ]; then
    echo "failed programs:$broken"
    exit 1
fi
