#!/usr/bin/env bash
# On a GPU machine without network: unpacks vLLM from .whl/, installs this tree beside it, and runs
# jobs on its GPUs in the background, as many as there is time for.
#
#   source benchmarks/gpu_machine.sh          once per command, in the repository's root
#   until_then 600                            seconds that all jobs have together
#   (on 0 0-15; job tests 300 60 python3 -m pytest -q -m gpu -n 12
#    bench engine 250 150 benchmarks.engine --cache 18 --repeats 5) &
#   (on 1 16-31; bench serve 200 140 benchmarks.serve --layers 16) &
#   wait; cat $RESULTS/status
#
# .whl/ holds vllm-0.26.0.tar.xz and wheels of what the machine lacks: pytest, pluggy, iniconfig,
# pytest-xdist, execnet; loguru for the tests with fp8; peft for benchmarks.training.
SITE=/tmp/site RESULTS=${RESULTS:-/tmp/results} RUN=/tmp/run
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || cat COMMIT)}
mkdir -p $SITE $RESULTS
[ -d $SITE/vllm ] || tar xJf .whl/vllm-0.26.0.tar.xz -C $SITE
for wheel in .whl/*.whl; do [ -e "$wheel" ] && python3 -m zipfile -e "$wheel" $SITE; done
export PYTHONPATH=$SITE VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target $SITE . 2>&1 | grep -v -i warn
# Jobs run where no package of ours lies: vLLM's processes would take that for the installed one,
# and it lacks its kernels.
rm -rf $RUN && mkdir -p $RUN && cp -r benchmarks deploy docs tests *.md pyproject.toml $RUN && cd $RUN

until_then() { END=$(( $(date +%s) + $1 )); }

on() { # GPU CORES: where the jobs of this shell run
  export CUDA_VISIBLE_DEVICES=$1
  CORES=$2
}

job() { # NAME MOST LEAST COMMAND...: at most MOST seconds, not at all if fewer than LEAST are left
  local name=$1 most=$2 least=$3 left=$(( END - $(date +%s) )) begin
  shift 3
  if [ $left -lt $least ]; then
    echo "$name: left out, $left s left" >> $RESULTS/status
    return 9
  fi
  begin=$(date +%s)
  mkdir -p $RESULTS/$name
  # By SIGINT, so that servers and engines go with who began them, and their memory with them.
  timeout -s INT -k 15 $(( left < most ? left : most )) taskset -c $CORES "$@" > $RESULTS/$name/log 2>&1
  local code=$?
  echo "$name: exit code $code after $(( $(date +%s) - begin )) s" >> $RESULTS/status
  return $code
}

bench() { # NAME MOST LEAST MODULE ARGUMENTS...: a job of a benchmark that saves a result file
  local name=$1 most=$2 least=$3
  shift 3
  job $name $most $least python3 -m "$@" --out $RESULTS/$name --commit $COMMIT
}
