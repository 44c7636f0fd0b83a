"""Pictures of what was dropped: the prompt in the terminal, and as a page with a slider through the stages (used by infer.py)."""
import json
from pathlib import Path


def dropped_at(trace, n):
    """For each of n prompt tokens the stage (from 1) that dropped it, 0 for the survivors."""
    stage_of = [0] * n
    for s, stage in enumerate(trace, start=1):
        for position in set(stage.seen[0].tolist()) - set(stage.kept[0].tolist()):
            stage_of[position] = s
    return stage_of


def survivors_text(pieces, stage_of, stages, color):
    """The prompt in the terminal: survivors bold, dropped tokens from dark (dropped first) to bright; without colour, a dot each."""
    def shade(s):                   # 256-colour ramp of greys
        return 236 + round(14 * (s - 1) / max(1, stages - 1))
    out = []
    for piece, s in zip(pieces, stage_of):
        if not color:
            out.append(piece if s == 0 else "\u00b7")
        else:
            out.append(f"\x1b[1;30;48;5;114m{piece}\x1b[0m" if s == 0 else f"\x1b[38;5;{shade(s)}m{piece}\x1b[0m")
    legend = [f"stage {s}: {stage_of.count(s)}" for s in range(1, stages + 1)]
    if color:
        legend = [f"\x1b[38;5;{shade(s)}m{text}\x1b[0m" for s, text in enumerate(legend, start=1)]
    return "".join(out) + f"\n\nkept to the end: {stage_of.count(0)} of {len(stage_of)}; dropped by " + ", ".join(legend)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Survivors</title>
<style>
:root{color-scheme:light dark;--bg:#fdfdfb;--fg:#181818;--gone:#b9b9b4;--keep:#bfe8c4}
@media(prefers-color-scheme:dark){:root{--bg:#161817;--fg:#eee;--gone:#55585a;--keep:#22572c}}
body{background:var(--bg);color:var(--fg);font:16px/1.7 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
#text{white-space:pre-wrap;overflow-wrap:anywhere}#text span{border-radius:3px}#text .kept{background:var(--keep)}#text .gone{color:var(--gone);text-decoration:line-through}
#text span:hover,#text span:focus{outline:2px solid currentColor}input{width:100%}#info{min-height:3.4em;font-variant-numeric:tabular-nums}
</style><h1>Which tokens survive</h1><label for="stage">Stage <output id="number"></output></label>
<input id="stage" type="range" min="0" value="0"><p id="info" aria-live="polite"></p><div id="text"></div><script>
const data=DATA,slider=document.getElementById("stage"),text=document.getElementById("text"),info=document.getElementById("info");
slider.max=data.blocks.length;slider.value=slider.max;
const show=t=>{info.textContent=JSON.stringify(t.piece)+(t.stage?" dropped by stage "+t.stage:" kept to the end")+"; scores "+t.scores.join(", ")};
for(const t of data.tokens){const e=document.createElement("span");e.textContent=t.piece;e.tabIndex=0;e.onmouseenter=e.onfocus=()=>show(t);text.append(e)}
const draw=()=>{const s=+slider.value;let left=0;data.tokens.forEach((t,i)=>{const gone=t.stage&&t.stage<=s;left+=!gone;text.children[i].className=gone?"gone":s?"kept":""});
document.getElementById("number").textContent=s+" of "+data.blocks.length+(s?", after block "+data.blocks[s-1]:"");info.textContent=left+" of "+data.tokens.length+" tokens left"};
slider.oninput=draw;draw();</script></html>"""


def survivors_page(path, pieces, stage_of, trace):
    """The same as one self-contained page: a slider through the stages, a token's scores on hover or focus."""
    scores = [[] for _ in pieces]
    for stage in trace:
        for position, value in zip(stage.seen[0].tolist(), stage.score[0].tolist()):
            scores[position].append(round(value, 3))
    data = {"blocks": [stage.block for stage in trace],
            "tokens": [{"piece": p, "stage": s, "scores": v} for p, s, v in zip(pieces, stage_of, scores)]}
    # "<" escaped: no text of the prompt can close the script
    Path(path).write_text(PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1), encoding="utf-8")
