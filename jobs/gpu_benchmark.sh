#!/usr/bin/env bash
# How fast raydpo scores and trains a model of 8B on this machine's GPU, beside TRL, in 15 minutes:
#
#     git clone URL raydpo && cd raydpo && jobs/gpu_benchmark.sh
#
# Needs Python 3.11 or newer, NVIDIA's driver, and 20 GB of disk. The weights are random and the pairs are made up; no model
# and no data set is downloaded. The packages of constraints.txt go into build/gpu-venv, unless $PYTHON has them already. Without a
# network, what $PYTHON has is used, and a line names what is skipped for it.
#
# The table is printed and written to build/gpu-benchmark/result.md, with result.json beside it, after each measurement. Options are
# those of 'python -m raydpo.benchmark.few_layers --help': --out DIR, --layers 2,4 for a smaller GPU, --seconds, --work DIR.
# 'jobs/gpu_benchmark.sh --device cpu --tiny' tries the code without a GPU.
#
# PYTHON   the Python to use (python3)
# SECONDS_IN_ALL   time for everything, installing included (900, at least 60)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
venv=build/gpu-venv
total=${SECONDS_IN_ALL:-900}

refuse() {
    echo "error: $*" >&2
    exit 2
}

# Packages of the list $2... that the Python $1 lacks.
lacks() {
    local where=$1
    shift
    "$where" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "$@"
}

[[ $total =~ ^[1-9][0-9]{1,8}$ ]] && [ "$total" -ge 60 ] \
    || refuse "SECONDS_IN_ALL is '$total'; expected a whole number of seconds, at least 60, such as 900"

needed=(torch transformers tokenizers safetensors numpy pyarrow pydantic yaml rich jinja2)
wanted=(peft deepspeed trl datasets)

command -v "$python" > /dev/null || refuse "there is no $python; set PYTHON to a Python of 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || refuse "$python is $("$python" --version 2>&1); set PYTHON to a Python of 3.11 or newer"
case " $* " in
    *" --device cpu "* | *" --device=cpu "* | *" --help "* | *" -h "*) ;;
    *)
        command -v nvidia-smi > /dev/null || refuse "there is no nvidia-smi, so no NVIDIA driver; --device cpu --tiny tries the code"
        nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || refuse "nvidia-smi finds no GPU"
        ;;
esac

if [ -n "$(lacks "$python" "${needed[@]}" "${wanted[@]}")" ]; then
    echo "installing the packages of constraints.txt into $venv (once, minutes)"
    if { [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"; } \
        && "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --retries 1 --timeout 15 \
            -c constraints.txt -e ".[gpu,benchmark]"; then
        python=$venv/bin/python
    else
        echo "the packages cannot be installed (no network?); going on with what $python has"
    fi
fi
missing=$(lacks "$python" "${needed[@]}")
[ -z "$missing" ] || refuse "$python lacks ${missing// /, }, without which nothing can be measured; install them"
missing=$(lacks "$python" "${wanted[@]}")
[ -z "$missing" ] || echo "skipped without ${missing// /, }: TRL needs trl and datasets, training deepspeed, LoRA peft"

# SECONDS is bash's clock of this script.
left=$((total - SECONDS))
[ "$left" -ge 60 ] || refuse "$left of $total seconds are left to measure; run this again, or set SECONDS_IN_ALL to more"

# This checkout, not another one that is installed.
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m raydpo.benchmark.few_layers --seconds "$left" "$@"
