#!/usr/bin/env bash
# Measures what docs/results holds, on a host with GPUs: docs/tools/measure.sh OUT STAGE...
#
# Each stage has a time limit, prints its last lines and leaves JSON in OUT. A comparison that was cut off resumes.
#
#   tests         kernels, accumulators, ring and transports on these GPUs
#   cells         the parity table, all cells for this number of GPUs
#   forward, training                        the paper's table, both workloads, all methods
#   baselines_forward_10k, baselines_forward_100k, baselines_training_10k, baselines_training_100k: RA+SP, TP=2, PP=2 and DP
#   parts_10k     where training on paper_10k goes, by ring attention and DP
#   copies        RA+SP with both transports, alternating
#   step          training at L = 131,072 beside its roofline
#   bench, short, bench_gqa                  attention alone: 16k to 128k tokens, 2k to 8k, a quarter of the heads for K,V
#   graphs        one rank of rings of up to 64 with CUDA graphs and without, on one GPU
#   packed, packed_links                     packed documents: beside varlen on one GPU; all methods on all GPUs
#   precision     the ring's errors against its degree, on one GPU
#   whole_8b      a first and a second step of a whole Llama 3.1 8B from a Hugging Face folder, 131,072 tokens per GPU
#   whole_8b_long the first step of it with 262,144 tokens per GPU; takes 7 minutes on two
#   heads_512, heads_512_10k                 attention alone with heads of 512
#   simulated     one rank of larger rings, on one GPU
#   kernels       each attention kernel's speed, on one GPU
#   ring_kernels  each kernel call of a ring of two by itself, on one GPU
#   memory_1, memory_2                       peaks of steps, predicted and measured
#   tools         what each memory tool costs, all GPUs at once
#   flat          peaks of steps with equal tokens per rank on 1, 2 and 4 GPUs
#   million, half_million, two_million, longest_two: one step of layers of Llama 3.1 8B's shape
#   faults        a stopped rank
#   sanitizer     memory and races of our Triton kernels, on one GPU
#   On more than two GPUs: wide_cells, wide_bench, wide_forward_10k, wide_forward_100k, wide_training_10k, wide_training_100k, scaling
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath "$1"); shift
mkdir -p "$out/runs"
export WANDB_MODE=offline OMP_NUM_THREADS=4 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1

limited() { # limited SECONDS LINES NAME COMMAND...
  local seconds=$1 lines=$2 name=$3 started=$SECONDS; shift 3
  timeout -k 5 "$seconds" "$@" > "$out/$name.log" 2>&1
  echo "== $name: exit $?, $((SECONDS - started)) s"
  tail -n "$lines" "$out/$name.log" | cut -c1-200
}
compare() { # compare SECONDS NAME OVERRIDES...
  local seconds=$1 name=$2; shift 2
  limited "$seconds" 14 "$name" python3 train.py recipe=compare +experiment=paper_table compare.steps_per_round=1 \
    hydra.run.dir="$out/runs/$name" "$@"
  cp "$out/runs/$name/comparison.json" "$out/$name.json" 2> /dev/null
}
baselines() { # baselines SECONDS RECIPE WORKLOAD MICRO_BATCH_SIZES ROUNDS OVERRIDES...
  local seconds=$1 recipe=$2 workload=$3 sizes=$4 rounds=$5; shift 5
  compare "$seconds" "baselines_${workload}_$recipe" compare.recipe="$recipe" workload="$workload" compare.micro_batch_sizes="$sizes" \
    compare.rounds="$rounds" compare.only=[tp_pp,pp,ra_sp,dp] breakdown=false "$@"
}
wide() { # wide SECONDS RECIPE WORKLOAD MICRO_BATCH_SIZES OVERRIDES...
  local seconds=$1 recipe=$2 workload=$3 sizes=$4; shift 4
  compare "$seconds" "wide_${workload}_$recipe" compare.recipe="$recipe" workload="$workload" compare.micro_batch_sizes="$sizes" \
    compare.rounds=2 compare.only=[tp_pp,tp,ra_sp,hybrid,ulysses,all_gather,dp] breakdown=false \
    "compare.entries.hybrid=['+experiment=hybrid','parallelism.ulysses_degree=2']" "$@"
}
bench() { # bench SECONDS NAME LENGTH OVERRIDES...
  local seconds=$1 name=$2 length=$3; shift 3
  limited "$seconds" 14 "$name" python3 train.py recipe=bench_attention model=llama_8b model.num_kv_heads=32 \
    data.sequence_length="$length" hydra.run.dir="$out/runs/$name" "$@"
  cp "$out/runs/$name/bench_attention.json" "$out/$name.json" 2> /dev/null
}

long="model=llama_8b model.num_layers=8 engine.recompute=selective engine.offload_activations=true engine.offload_optimizer=true"

for stage in "$@"; do
  case $stage in
    tests)
      limited 60 4 test_merge python3 -m pytest -q -p no:cacheprovider tests/gpu/test_merge.py
      limited 150 4 test_streams python3 -m pytest -q -p no:cacheprovider tests/gpu/test_streams.py
      limited 360 12 test_ring python3 -m pytest -q -x -p no:cacheprovider tests/gpu/test_ring.py -k "whole_attention or copies or drift or stalled"
      limited 60 6 test_step_logger python3 -m pytest -q -p no:cacheprovider tests/gpu/test_step_logger.py ;;
    cells) limited 540 6 parity python3 -m tests.distributed.parity --json "$out/parity.json" ;;
    forward)
      compare 420 forward_10k compare.micro_batch_sizes=[1,2]
      compare 420 forward_100k workload=paper_100k compare.rounds=3 ;;
    training)
      compare 420 training_10k compare.recipe=pretrain compare.micro_batch_sizes=[1,2]
      compare 420 training_100k compare.recipe=pretrain workload=paper_100k compare.rounds=2 ;;
    baselines_forward_10k) baselines 200 forward paper_10k [1,2] 2 ;;
    baselines_forward_100k) baselines 190 forward paper_100k [1] 2 ;;
    # the batch is given: the default, a multiple of 4 sequences in each of a pipeline's 16 micro-batches, makes steps of 13 s
    baselines_training_10k) baselines 430 pretrain paper_10k [1,2,4] 2 compare.downscale=false engine.train_batch_size=32 ;;
    baselines_training_100k) baselines 400 pretrain paper_100k [1] 2 ;;
    parts_10k) # where RA+SP's training step goes, beside DP's, and the kernel for heads of 512 on its tiles
      compare 330 parts_10k compare.recipe=pretrain compare.only=[ra_sp,ra_p2p,dp] compare.baseline=dp compare.rounds=1 compare.micro_batch_sizes=[2,4] \
        "+compare.entries.ra_p2p=['+experiment=ra_sp','attention.transport=p2p']"
      CUDA_VISIBLE_DEVICES=${GPU:-0} limited 100 8 heads_512_kernels python3 -m tests.tools.kernel_speeds --dtype fp16 --head-dims 512 --lengths 2500 5000 10000 --json "$out/heads_512_kernels.json" ;;
    copies)
      for workload in paper_10k paper_100k; do
        compare 200 "copies_$workload" workload=$workload compare.only=[ra_sp,ra_p2p,dp] compare.baseline=dp compare.rounds=2 \
          "+compare.entries.ra_p2p=['+experiment=ra_sp','attention.transport=p2p']"
      done ;;
    bench)
      bench 120 attention_16k 16384 compare.rounds=5
      bench 120 attention_64k 65536
      bench 150 attention_128k 131072 ;;
    short)
      for length in 2048 4096 8192; do bench 60 "attention_$length" $length; done ;;
    graphs) CUDA_VISIBLE_DEVICES=${GPU:-0} limited 120 5 graphs python3 -m tests.tools.simulated_rings --json "$out/graphs.json" ;;
    packed) CUDA_VISIBLE_DEVICES=${GPU:-0} limited 200 5 packed python3 -m tests.tools.packed_speed --json "$out/packed.json" ;;
    packed_links)
      for documents in lognormal 8x8192 32x2048 256x256; do bench 150 "packed_$documents" 65536 model.num_kv_heads=8 "+documents=$documents" breakdown=false; done ;;
    precision) CUDA_VISIBLE_DEVICES=${GPU:-0} limited 90 7 precision python3 -m tests.tools.precision --device cuda --length 8192 --json "$out/precision.json" ;;
    whole_8b | whole_8b_long) # the folder takes 15 GiB and 40 s; activations of all layers are on the host
      limited 120 1 llama_folder python3 -m tests.tools.llama_folder "$out/runs/llama_8b" model=llama_8b
      whole="model.path=$out/runs/llama_8b attention=ring engine.zero_stage=3 engine.offload_activations=true engine.train_batch_size=1"
      gpus=$(nvidia-smi -L | wc -l)
      if [ "$stage" = whole_8b ]; then
        settings=("$whole engine.recompute=selective data.sequence_length=$((131072 * gpus))")
        settings+=("${settings[0]} num_steps=2")
      else
        settings=("$whole engine.recompute=full data.sequence_length=$((262144 * gpus))")
      fi
      limited 595 2 "$stage" python3 -m tests.tools.long_step --json "$out/$stage.json" "${settings[@]}" ;;
    heads_512) bench 90 heads_512 32768 model=paper_10k model.num_kv_heads=16 engine.dtype=fp16 ;;
    heads_512_10k) bench 120 heads_512_10k 10000 model=paper_10k model.num_kv_heads=16 engine.dtype=fp16 engine.micro_batch_size=4 compare.rounds=4 ;;
    simulated) CUDA_VISIBLE_DEVICES=${GPU:-0} bench 150 simulated_64k 65536 launch.num_ranks=1 ;;
    kernels) CUDA_VISIBLE_DEVICES=${GPU:-0} limited 300 22 kernel_speeds python3 -m tests.tools.kernel_speeds --json "$out/kernel_speeds.json" ;;
    ring_kernels)
      for length in 16384 65536 131072; do
        CUDA_VISIBLE_DEVICES=${GPU:-0} limited 60 13 "ring_kernels_$length" python3 -m tests.tools.ring_kernels --length $length --json "$out/ring_kernels_$length.json"
      done ;;
    memory_*) # predicted and measured
      ranks=${stage#memory_}
      settings=()
      for more in "" "engine.recompute=full" "engine.recompute=selective" "engine.recompute=selective engine.tile_tokens=4096" \
        "engine.zero_stage=3 engine.recompute=selective" "model.mlp=gelu model.norm=layernorm engine.recompute=full" "engine.dtype=fp32" "data.sequence_length=4096 engine.zero_stage=2"; do
        settings+=("model=llama_1b data.sequence_length=16384 launch.num_ranks=$ranks model.num_layers=4 $more")
      done
      limited 300 8 "memory_$ranks" python3 -m tests.tools.long_step --json "$out/memory_$ranks.json" "${settings[@]}" ;;
    flat) # equal tokens per rank on 1, 2 and 4 ranks, enough that the optimizer's state is the lesser part
      settings=()
      for ranks in 1 2 4; do
        [ "$ranks" -le "$(nvidia-smi -L | wc -l)" ] || continue
        settings+=("model=llama_1b model.num_layers=4 data.sequence_length=$((131072 * ranks)) launch.num_ranks=$ranks engine.recompute=selective")
      done
      limited 200 4 flat python3 -m tests.tools.long_step --json "$out/flat.json" "${settings[@]}" ;;
    million) # takes 96 GiB of the host for activations, and 42 for the optimizer
      limited 570 2 million python3 -m tests.tools.long_step --json "$out/million.json" "$long data.sequence_length=1000000 launch.num_ranks=1" ;;
    half_million) limited 300 2 half_million python3 -m tests.tools.long_step --json "$out/half_million.json" "$long data.sequence_length=524288 launch.num_ranks=1" ;;
    two_million) limited 400 2 two_million python3 -m tests.tools.long_step --json "$out/two_million.json" "$long model.num_layers=2 data.sequence_length=2097152 launch.num_ranks=2" ;;
    longest_two) limited 595 2 longest_two python3 -m tests.tools.long_step --json "$out/longest_two.json" "$long data.sequence_length=1500000 launch.num_ranks=2" ;;
    tools) # 49,152 tokens fit an H100 without any tool; the settings are shared out among the GPUs
      settings=()
      for more in "" "engine.tile_tokens=8192" "engine.recompute=selective" "engine.recompute=full" "engine.recompute=selective engine.offload_activations=true" \
        "engine.offload_optimizer=true" "engine.zero_stage=3 engine.offload_optimizer=true engine.offload_parameters=true" \
        "engine.recompute=selective engine.offload_activations=true engine.offload_optimizer=true"; do
        settings+=("model=llama_8b model.num_layers=4 data.sequence_length=49152 launch.num_ranks=1 num_steps=3 $more")
      done
      gpus=$(nvidia-smi -L | wc -l)
      for gpu in $(seq 0 $((gpus - 1))); do
        own=(); for i in "${!settings[@]}"; do [ $((i % gpus)) -eq "$gpu" ] && own+=("${settings[i]}"); done
        CUDA_VISIBLE_DEVICES=$gpu limited 420 "${#own[@]}" "tools_$gpu" python3 -m tests.tools.long_step --json "$out/tools_$gpu.json" "${own[@]}" &
      done
      wait ;;
    wide_cells) # the host is the limit, so all parts run at once
      for part in 0 1 2 3; do
        limited 400 2 "parity_part_$part" python3 -m tests.distributed.parity --least-ranks "$(nvidia-smi -L | wc -l)" --part $part 4 --json "$out/parity_part_$part.json" &
      done
      wait ;;
    wide_bench) for length in 32768 65536 131072; do bench 120 "attention_$length" $length; done ;;
    bench_gqa) for length in 32768 65536 131072; do bench 120 "attention_gqa_$length" $length model.num_kv_heads=8; done ;;
    wide_forward_10k) wide 300 forward paper_10k [1,4] ;;
    wide_forward_100k) wide 240 forward paper_100k [1] ;;
    # the batch is given: see baselines_training_10k
    wide_training_10k) wide 550 pretrain paper_10k [1,2,4] compare.downscale=false engine.train_batch_size=32 ;;
    wide_training_100k) wide 440 pretrain paper_100k [1] ;;
    scaling) # a small batch is given: there is no pipeline, and one GPU takes 3 s for four sequences of 100,000
      for kind in strong weak; do
        limited 200 14 "${kind}_scaling" python3 train.py recipe=compare +experiment=${kind}_scaling compare.steps_per_round=1 compare.rounds=2 breakdown=false \
          compare.downscale=false engine.train_batch_size=4 hydra.run.dir="$out/runs/${kind}_scaling"
        cp "$out/runs/${kind}_scaling/comparison.json" "$out/${kind}_scaling.json" 2> /dev/null
      done ;;
    faults) limited 120 6 watchdog python3 -m pytest -q -p no:cacheprovider tests/gpu/test_watchdog.py ;;
    sanitizer)
      for tool in memcheck racecheck synccheck initcheck; do
        CUDA_VISIBLE_DEVICES=${GPU:-0} PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 150 4 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
          --kernel-regex kns=_kernel python3 -m pytest -q -x -p no:cacheprovider tests/gpu/test_merge.py -k "40 or 512"
      done ;;
    step)
      limited 420 16 step python3 train.py recipe=compare +experiment=bench_step compare.steps_per_round=1 hydra.run.dir="$out/runs/step"
      cp "$out/runs/step/comparison.json" "$out/step.json" ;;
    *) echo "unknown stage $stage"; exit 2 ;;
  esac
done
