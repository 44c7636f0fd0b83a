#!/usr/bin/env bash
# Everything that results/ holds, with the committed predictors:
#
#     bash results/make.sh DATA [NAME ...]
#
# DATA is a folder with the data sets' JSONL files (dolly, wikitext2_valid, lambada, multi_news, qmsum,
# copa, piqa, winogrande, boolq); with NAMEs only those results are made. A result that is there already
# is not measured again; a command that was stopped goes on where it was. RESULTS=FOLDER measures into
# another folder, to compare. GGUF=FOLDER: also beside llama.cpp (pip install llama-cpp-python).
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

page() {    # page NAME STAGE.TOKEN HEIGHT COMMAND...: a picture of the command's page; needs Chromium
    local name=$1 view=$2 height=$3
    shift 3
    wanted "$results/$name.png" "$name" || return 0
    "$@" --html "out/$name.html"
    local root=()
    [[ $EUID != 0 ]] || root=(--no-sandbox)     # Chromium has no sandbox for root
    "${CHROMIUM:-chromium}" --headless=new "${root[@]}" --disable-gpu --hide-scrollbars \
        --blink-settings=preferredColorScheme=1 --window-size="1150,$height" \
        --screenshot="$(realpath "$results")/$name.png" "file://$PWD/out/$name.html#$view"
}

real="--ckpt smollm2 --dtype bfloat16"
dolly="--data $data/dolly.jsonl --template chatml --context --min-prompt 128 --max-prompt 448"
quality="python -m lab.quality"

# Section 3.2: Figures 1 and 2
if wanted "$results/smollm2_figure1.png" smollm2_figure1; then
    python saliency.py --figure 1 --ckpt smollm2 --template chatml \
        --png "$results/smollm2_figure1.png" \
        --prompt "Who wrote the play Hamlet, and in which city was the theatre? The play Hamlet was \
written by William Shakespeare around 1600. It was first performed by his company at the Globe Theatre \
in London, and it is still one of the most often performed plays in the world." \
        --response "Hamlet was written by William Shakespeare, and the Globe Theatre stood in London."
fi
make smollm2_figure2 python saliency.py --figure 2 --ckpt smollm2 $dolly --limit 24 \
    --png "$results/smollm2_figure2.png"

# Section 3.3: ablations (Tables 4 and 5), and the training of the committed Dolly predictors
ablations="python -m lab.ablations --ckpt smollm2 $dolly"
make smollm2_targets $ablations --dtype bfloat16 --table targets --rows 300 --limit 40
make smollm2_losses $ablations --table losses --rows 100 --epochs 1 --limit 32
make smollm2_seeds $ablations --table seeds --rows 100 --epochs 1 --limit 32 --seeds 0 1 2
best="--max-response 96 --cls 0 --mse 0 --pairs saliency --states marked --hold"
make smollm2_training python train.py $real $dolly $best --epochs 2 --report-every 200 \
    --out out/smollm2-dolly --png "$results/smollm2_training.png"

# Rows with passages; checkpoints/smollm2/passages.safetensors are the predictors of seed 0,
# checkpoints/qwen2.5-coder-0.5b/passages.safetensors those of --limit 200 --epochs 16
passages="python -m lab.tasks --data $data/dolly.jsonl"
$passages --out out/passages.jsonl
$passages --out out/passages-8.jsonl --passages 8
$passages --out out/passages-mixed.jsonl --plain 0.5
training="--data out/passages-mixed.jsonl --context --max-prompt 2000 $best --report-rows 0"
mixed="$training --around 0.5 --near"
four="--data out/passages.jsonl --context --max-prompt 2000"
small="--ckpt smollm2 --predictors checkpoints/smollm2/passages.safetensors"
large="--ckpt qwen2.5-coder-0.5b --predictors checkpoints/qwen2.5-coder-0.5b/passages.safetensors"

make smollm2_teachers python -m lab.ablations --ckpt smollm2 --data out/passages-mixed.jsonl \
    --context --max-prompt 2000 --table teachers --rows 80 --epochs 4 --limit 40
for place in first both; do         # trained so, asked at both ends, as infer.py does
    wanted "$results/smollm2_taught_$place.json" smollm2_taught_$place || continue
    python train.py --ckpt smollm2 $mixed --question $place --epochs 4 --limit 80 \
        --out out/taught-$place
    make smollm2_taught_$place $quality --ckpt smollm2 --predictors out/taught-$place $four \
        --question both --limit 40 --scorers full predictor random
done
chosen="$four --split validation --limit 40"
make smollm2_mass $quality $small $chosen --scorers full predictor predictor:0.9973 random
make smollm2_validation_both $quality $small $chosen --question both \
    --scorers full predictor random

# Section 4: long prompts (Table 1)
arms="--scorers full predictor predictor@5 compress random recent"
for task in multi_news qmsum; do
    make smollm2_$task $quality $real --task long --max-prompt 2048 --min-prompt 1024 $arms \
        --rouge --data $data/$task.jsonl --limit 10
done
make smollm2_dolly_f1 $quality $real --task long --data $data/dolly.jsonl \
    --min-prompt 128 --max-prompt 448 --limit 40 $arms
make smollm2_passages_f1 $quality $small --task long --data out/passages.jsonl --max-prompt 2000 \
    --limit 40 --scorers full predictor neighbours random truncate

# Accuracy (Table 3), in fp32: answers may differ by less than bfloat16 tells
harness="python -m lab.harness --ckpt smollm2 --data $data"
arms="--scorers full predictor random recent attention"
make smollm2_harness_0 $harness --tasks copa piqa winogrande boolq lambada_openai --limit 100 $arms
make smollm2_harness_5 $harness --tasks copa piqa winogrande boolq --num-fewshot 5 --limit 40 $arms

# Figures 4 and 5, and H2O (Table 6)
make smollm2_figures $ablations --table figures --rows 100 --limit 16 --png "$results/smollm2"
arms="--scorers full full+h2o full+local predictor predictor+h2o"
make smollm2_harness_h2o $harness --tasks copa piqa --num-fewshot 5 --limit 40 $arms
make smollm2_h2o_nll $quality $real $dolly --limit 24 $arms random

# Likelihood under every scorer
make toy_exact python checkpoints/toy.py --eval 100
make smollm2_nll $quality $real $dolly --limit 120 --scorers full predictor random recent \
    earliest norm attention oracle:norm_gx oracle:norm_g oracle:abs_dot
arms="full predictor predictor@cut random earliest recent norm attention
    earliest@cut recent@cut norm@cut attention@cut truncate"
make smollm2_rules $quality --ckpt smollm2 $dolly --limit 60 --scorers $arms oracle:norm_gx
make smollm2_text_rules $quality --ckpt smollm2 --task text --data $data/wikitext2_valid.jsonl \
    --max-prompt 256 --max-response 64 --limit 40 --scorers $arms oracle:norm_gx
make smollm2_tradeoff $ablations --dtype bfloat16 --table tradeoff --limit 120

# Passages
make smollm2_passages $quality $small $four --limit 65 \
    --scorers ${arms/predictor@cut/predictor@cut neighbours} oracle:norm_gx
for seed in 1 2; do
    wanted "$results/smollm2_passages_seed$seed.json" smollm2_passages_seed$seed || continue
    python train.py --ckpt smollm2 $mixed --epochs 8 --limit 400 --seed $seed --out out/seed$seed
    make smollm2_passages_seed$seed $quality --ckpt smollm2 --predictors out/seed$seed $four \
        --limit 65 --scorers full predictor neighbours random
done
for part in near around; do         # docs/choices.md: one of the two without the other
    wanted "out/$part.log" $part || continue
    python train.py --ckpt smollm2 $training --$part $([[ $part == near ]] || echo 0.5) \
        --epochs 8 --limit 400 --out "out/$part"
    $quality --ckpt smollm2 --predictors "out/$part" $four --limit 65 \
        --scorers full predictor random > "out/$part.lines"
    mv "out/$part.lines" "out/$part.log"
done
arms="full predictor random earliest earliest@cut recent@cut truncate oracle:norm_gx"
make smollm2_passages_8 $quality $small --data out/passages-8.jsonl --context --max-prompt 2200 \
    --limit 16 --scorers $arms

# The field's ways to drop tokens: the question in every place, two budgets, short prompts, where
# words do not tell, and a small model that drafts for a larger one
arms="full predictor neighbours progressive middle adaptive:0.93 two-pass lookahead lookahead:32
    bm25 bm25:passage truncate random"
for place in first last; do
    make smollm2_field_$place $quality $small $four --question $place --limit 65 --scorers $arms
done
make smollm2_field_dolly $quality --ckpt smollm2 $dolly --question first --limit 60 --scorers $arms
arms="full predictor neighbours middle adaptive:0.93 lookahead lookahead:32 bm25:passage truncate
    random"
make smollm2_field_both $quality $small $four --question both --limit 65 --scorers $arms
make smollm2_field_both_more $quality $small $four --question both --limit 65 \
    --scorers full predictor progressive two-pass bm25 random
for place in last both; do
    make smollm2_field_dolly_$place $quality --ckpt smollm2 $dolly --question $place --limit 60 \
        --scorers $arms
done
make smollm2_field_40 $quality $small $four --limit 40 --keep 0.745 --scorers full predictor \
    neighbours adaptive:0.7 lookahead lookahead:32 bm25:passage truncate random
make smollm2_field_40_more $quality $small $four --limit 40 --keep 0.745 \
    --scorers full predictor progressive bm25 random
make smollm2_field_40_cut $quality $small $four --limit 40 --keep 0.745 --scorers full predictor \
    predictor@cut neighbours@cut random
arms="full predictor lookahead:32 middle adaptive:0.93 bm25:passage truncate random"
make qwen05_field_first $quality $large $four --limit 40 --scorers $arms lookahead
make qwen05_field_last $quality $large $four --question last --limit 40 --scorers $arms
make qwen05_field_both $quality $large $four --question both --limit 40 \
    --scorers full predictor lookahead:32 adaptive:0.93 truncate random
make qwen15_field $quality --ckpt qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b \
    --data out/passages.jsonl --context --max-prompt 900 --limit 24 \
    --scorers full lookahead lookahead:32 bm25:passage truncate random
$passages --out out/passages-alike.jsonl --alike
make smollm2_field_alike $quality $small --data out/passages-alike.jsonl --context \
    --max-prompt 2000 --split all --scorers full predictor neighbours lookahead lookahead:32 \
    bm25:passage truncate random bm25

# Larger models; the 1.5B's predictors are not committed: 49 rows to mark are half an hour
arms="full predictor random earliest norm earliest@cut truncate oracle:norm_gx"
make qwen05_passages $quality $large $four --limit 65 --scorers $arms predictor@cut
make qwen05_dolly $quality $large --data $data/dolly.jsonl --context --min-prompt 128 \
    --max-prompt 448 --limit 40 --scorers $arms predictor@cut oracle:norm_gx@cut
chosen="--data $data/dolly.jsonl --context --min-prompt 128 --max-prompt 448 --split validation
    --limit 16 --scorers full predictor random"
make qwen05_places $quality $large $chosen predictor@cut
make qwen05_places_2 $quality $large $chosen --first 3 --step 6 --stages 2 --keep 0.72
make qwen05_places_3 $quality $large $chosen --step 4 --stages 3 --keep 0.79
make qwen05_places_7 $quality $large $chosen --first 7 --stages 1 --keep 0.475
largest="--ckpt qwen2.5-coder-1.5b --dtype bfloat16"
if wanted "$results/qwen15_passages.json" qwen15_passages; then
    python train.py $largest $mixed --epochs 16 --limit 49 --out out/passages-15
fi
make qwen15_passages $quality $largest --predictors out/passages-15 $four --limit 13 --scorers $arms
needle="$quality $large --task needle --data $data/wikitext2_valid.jsonl --lengths 1024 2048 4096"
for place in first last; do
    make qwen05_needle_$place $needle --question $place --scorers full predictor predictor@cut recent
    make qwen05_needle_${place}_field $needle --question $place --scorers lookahead:32 middle
done
arms="--scorers full predictor lookahead:32 middle"
make qwen05_needle_both ${needle% 4096} --question both $arms
make qwen05_needle_both_4096 ${needle/1024 2048 4096/4096} --question both $arms
for place in first last; do         # with two cores a depth takes three to seven minutes
    make qwen05_needle_${place}_8192 ${needle/1024 2048 4096/8192} --question $place $arms
done

# Speed (Table 2): nothing else may run
make qwen05_speed_cpu python -m lab.speed $large --lengths 1024 4096 8192 16384 32640
make qwen05_transformers_cpu python -m lab.speed $large --lengths 1024 4096 8192 \
    --vs transformers --repeats 5 --max-new-tokens 64
if [[ -n ${GGUF:-} ]]; then          # folder of smollm2.gguf and qwen2.5-coder-0.5b.gguf
    vs="--repeats 3 --max-new-tokens 32 --vs llama.cpp $GGUF"
    make smollm2_engines python -m lab.speed --ckpt smollm2 --lengths 512 1024 4096 \
        $vs/smollm2.gguf
    vs="$large $vs/qwen2.5-coder-0.5b.gguf"
    make qwen05_engines python -m lab.speed --lengths 512 1024 $vs
    make qwen05_engines_4096 python -m lab.speed --lengths 4096 ${vs/repeats 3/repeats 2}
fi
make smollm2_speed_cpu python -m lab.speed --ckpt smollm2 --lengths 512 1024 2048 4096 \
    --vs transformers --repeats 9

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
page toy_survivors 10.160 835 python infer.py
page smollm2_survivors 9.142 580 \
    python infer.py --ckpt smollm2 --template chatml --prompt "$text"
if [[ $results == results ]]; then python -m lab.report --figures; fi
