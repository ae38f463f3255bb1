#!/usr/bin/env bash
# On a GPU machine without network: unpacks vLLM from .whl/, installs this tree beside it.
# usage: source benchmarks/gpu_machine.sh
ROOT=$PWD SITE=/tmp/site
if [ ! -d $SITE/vllm ]; then mkdir -p $SITE && tar xJf .whl/vllm-0.26.0.tar.xz -C $SITE; fi
export PYTHONPATH=$SITE VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
if ls .whl/*.whl >/dev/null 2>&1; then python3 -m pip install -q --no-deps --upgrade --target $SITE .whl/*.whl 2>/dev/null; fi
python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target $SITE . 2>&1 | grep -v -i warn
