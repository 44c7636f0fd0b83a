#!/usr/bin/env bash
# Every measured table of README.md and docs/results.md, from nothing:
#
#     bash results/make.sh DATA [NAME ...]
#
# DATA is a folder with the data sets' JSONL files; with NAMEs only those results are made.
# A result that is there already is not measured again; a command that was stopped goes on where
# it was. RESULTS=FOLDER measures into another folder, to compare.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: bash results/make.sh DATA [NAME ...]}
shift
only=" $* "
results=${RESULTS:-results}
mkdir -p out "$results"

wanted() {  # wanted FILE NAME: is the file missing, and the name asked for?
    [[ ! -e $1 && ($only == "  " || $only == *" $2 "*) ]]
}

make() {    # make NAME COMMAND...: its JSON becomes $results/NAME.json, its text out/NAME.log
    local name=$1
    shift
    wanted "$results/$name.json" "$name" || return 0
    echo "== $name: $*"
    { "$@" --json 2>&1 >&3 | tee "out/$name.log"; } 3> "out/$name.line"
    python -m json.tool --indent 1 "out/$name.line" "out/$name.json"
    mv "out/$name.json" "$results/$name.json"
}

picture() { # picture NAME STAGE.TOKEN HEIGHT COMMAND...: the command's page there; needs Chromium
    local name=$1 view=$2 height=$3
    shift 3
    wanted "$results/$name.png" "$name" || return 0
    "$@" --html "out/$name.html"
    python -m lab.figures "out/$name.html#$view" "$results/$name.png" --size 1150 "$height"
}

real="--ckpt smollm2 --dtype bfloat16"
dolly="--data $data/dolly.jsonl --template chatml --context --min-prompt 128 --max-prompt 448"
quality="python -m lab.quality"
ablations="python -m lab.ablations $real $dolly"

# The toy, and the training of SmolLM2's predictors
make toy_exact python checkpoints/toy.py --eval 500
make smollm2_training python train.py $real $dolly \
    --max-response 96 --cls 0 --mse 0 --pairs saliency --states marked --hold --epochs 2 \
    --report-every 200 --calibrate 96 --out out/smollm2
make smollm2_figure2 python saliency.py --figure 2 --ckpt smollm2 $dolly --limit 24 \
    --png "$results/smollm2_figure2.png"

# Likelihood and accuracy of every scorer
make smollm2_nll $quality $real $dolly --limit 120
[[ -e out/passages.jsonl ]] || python -m lab.passages --data "$data/dolly.jsonl" --out out/passages.jsonl
make smollm2_passages $quality --ckpt smollm2 --predictors checkpoints/smollm2/passages.safetensors \
    --data out/passages.jsonl --context --max-prompt 2000 --limit 65 \
    --scorers full predictor predictor@cut neighbours random earliest recent norm attention expected \
    earliest@cut recent@cut norm@cut attention@cut expected@cut truncate oracle:norm_gx
python -m lab.passages --data "$data/dolly.jsonl" --out out/passages-mixed.jsonl --plain 0.5
mixed="--data out/passages-mixed.jsonl --context --max-prompt 2000 --max-response 96 --report-rows 0
    --cls 0 --mse 0 --pairs saliency --states marked --around 0.5 --near --hold"
for seed in 1 2; do         # the committed predictors are those of seed 0
    wanted "$results/smollm2_passages_seed$seed.json" smollm2_passages_seed$seed || continue
    python train.py --ckpt smollm2 $mixed --epochs 8 --limit 400 --seed $seed \
        --out out/passages-seed$seed
    make smollm2_passages_seed$seed $quality --ckpt smollm2 \
        --predictors out/passages-seed$seed/predictors.safetensors --data out/passages.jsonl \
        --context --max-prompt 2000 --limit 65 --scorers full predictor neighbours random
done
passages="--predictors checkpoints/smollm2/passages.safetensors --max-prompt 2200"
for part in passage question; do
    context=$([[ $part == question ]] || echo --context)
    rows=out/passages-$part.jsonl
    python -m lab.passages --data "$data/dolly.jsonl" --out $rows --alone $part
    make smollm2_${part}_alone $quality --ckpt smollm2 $passages --data $rows $context --limit 65 \
        --scorers full
done
python -m lab.passages --data "$data/dolly.jsonl" --out out/passages-8.jsonl --passages 8
some="--limit 16 --scorers full predictor random earliest earliest@cut recent@cut truncate oracle:norm_gx"
make smollm2_passages_8 $quality --ckpt smollm2 $passages --data out/passages-8.jsonl --context $some
make smollm2_passages_last $quality --ckpt smollm2 $passages --data out/passages.jsonl --context \
    --max-prompt 2000 --question last $some
# kvpress lives in an environment of its own, see lab/peers.py; PEERS is its folder bin
[[ -z ${PEERS:-} ]] || PATH="$PEERS:$PATH" make smollm2_peers python -m lab.peers --ckpt smollm2 \
    $passages --max-prompt 2000 --data out/passages.jsonl --context --limit 20 \
    --scorers full predictor neighbours random
rules="full predictor prior predictor@cut random earliest recent norm attention expected
    earliest@cut recent@cut norm@cut attention@cut expected@cut truncate"
make smollm2_rules $quality --ckpt smollm2 $dolly --limit 60 --scorers $rules oracle:norm_gx
make smollm2_text_rules $quality --ckpt smollm2 --task text --data $data/wikitext2_valid.jsonl \
    --max-prompt 256 --max-response 64 --limit 40 --scorers $rules oracle:norm_gx
make smollm2_lambada_rules $quality --ckpt smollm2 --task lambada --data $data/lambada.jsonl \
    --limit 80 --scorers $rules
larger="--ckpt qwen2.5-coder-0.5b --predictors checkpoints/qwen2.5-coder-0.5b/passages.safetensors"
some="--scorers full predictor random earliest norm earliest@cut truncate oracle:norm_gx"
both="${some/predictor/predictor predictor@cut}"
make qwen05_dolly $quality $larger --data $data/dolly.jsonl --context --min-prompt 128 \
    --max-prompt 448 --limit 40 $both oracle:norm_gx@cut
make qwen05_passages $quality $larger --data out/passages.jsonl --context --max-prompt 2000 \
    --limit 65 $both
# the 1.5B's predictors are not committed: 49 rows to mark are half an hour
largest="--ckpt qwen2.5-coder-1.5b --dtype bfloat16"
if wanted "$results/qwen15_passages.json" qwen15_passages; then
    python train.py $largest $mixed --epochs 16 --limit 49 --out out/passages-15
fi
make qwen15_passages $quality $largest --predictors out/passages-15/predictors.safetensors \
    --data out/passages.jsonl --context --max-prompt 2000 --limit 13 $some
make qwen05_needle python -m lab.needle $larger --data $data/wikitext2_valid.jsonl \
    --lengths 1024 2048 4096 --png "$results/qwen05_needle.png"
make smollm2_text $quality $real --task text --data $data/wikitext2_valid.jsonl \
    --max-prompt 256 --max-response 64 --limit 40
# lm-evaluation-harness' own tasks; fp32: answers may differ by less than bfloat16 tells
harness="python -m lab.harness --ckpt smollm2 --data $data"
scorers="--scorers full predictor prior random recent attention"
make smollm2_harness_0 $harness --tasks copa piqa winogrande boolq lambada_openai --limit 100 $scorers
make smollm2_harness_5 $harness --tasks copa piqa winogrande boolq --num-fewshot 5 --limit 40 $scorers

# Long prompts, and H2O
scorers="--scorers full predictor predictor@5 compress random recent"
for task in multi_news qmsum; do
    make smollm2_$task $quality $real --task long --max-prompt 2048 --min-prompt 1024 $scorers \
        --rouge --data $data/$task.jsonl --limit 10
done
make smollm2_dolly_f1 $quality $real --task long --data $data/dolly.jsonl \
    --min-prompt 128 --max-prompt 448 --limit 40 $scorers
make smollm2_passages_f1 $quality --ckpt smollm2 $passages --task long --data out/passages.jsonl \
    --max-prompt 2000 --limit 40 --scorers full predictor neighbours random truncate
scorers="--scorers full full+h2o full+local predictor predictor+h2o"
make smollm2_harness_h2o $harness --tasks copa piqa --num-fewshot 5 --limit 40 $scorers
make smollm2_h2o_nll $quality $real $dolly --limit 24 $scorers random

# Ablations
ablations32="python -m lab.ablations --ckpt smollm2 $dolly"
make smollm2_losses $ablations32 --table losses --rows 100 --epochs 1 --limit 32
make smollm2_seeds $ablations32 --table seeds --rows 100 --epochs 1 --limit 32 --seeds 0 1 2
make smollm2_targets $ablations32 --table targets --rows 300 --limit 40
make smollm2_open $ablations --table open --rows 200 --limit 40 --text $data/wikitext2_valid.jsonl
make smollm2_tradeoff $ablations --table tradeoff --limit 120
make smollm2_figures $ablations32 --table figures --rows 100 --limit 16 --png "$results/smollm2"
make toy_gradient python -m lab.gradient
make smollm2_gradient python -m lab.gradient --ckpt smollm2 --template chatml --context \
    --data $data/dolly.jsonl --min-prompt 128 --max-prompt 200 --limit 4 --tokens 30

# Speed: nothing else may run
small="python -m lab.speed --ckpt smollm2 --lengths"
large="python -m lab.speed $larger --lengths"
make qwen05_speed_cpu $large 1024 4096 8192 16384 32640
make smollm2_speed_cpu $small 512 1024 2048 4096 --vs transformers --profile --repeats 9
make qwen05_transformers_cpu $large 1024 4096 8192 --vs transformers --repeats 5 --max-new-tokens 64
make smollm2_cost_cpu $small 256 512 1024 2048 4096 8192 --max-new-tokens 1 --repeats 3
make smollm2_eager_cpu $small 512 2048 --max-new-tokens 64
make smollm2_compiled_cpu $small 512 2048 --max-new-tokens 64 --compile
make qwen05_eager_cpu $large 1024 --max-new-tokens 32
make qwen05_compiled_cpu $large 1024 --max-new-tokens 32 --compile

# Pages of survivors
text="How was the Antikythera mechanism found, and what did it do?

In 1900 a crew of sponge divers from the island of Symi waited out a storm near Antikythera, a \
small island between Crete and the Greek mainland. When the sea was calm again, one of them \
dived for sponges and came back with the arm of a bronze statue: on the sea floor lay the wreck \
of a Roman merchant ship. The navy helped to raise what could be raised, jars, glass, coins, \
statues, and a corroded lump of bronze and wood that nobody looked at twice. Two years later, in \
the museum in Athens, an archaeologist noticed a gear wheel in it. Decades passed before X-rays \
showed some thirty gears inside. Turned by hand, they moved pointers that gave the positions of \
the sun and the moon, foretold eclipses, and counted the years between the games at Olympia. \
Nothing of comparable complexity is known from the next thousand years."
picture toy_survivors 10.195 835 python infer.py
picture smollm2_survivors 9.142 580 \
    python infer.py --ckpt smollm2 --template chatml --prompt "$text"
if [[ $results == results ]]; then python -m lab.tables --figures; fi
