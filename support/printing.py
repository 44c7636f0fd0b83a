"""How the numbers of Table 2 are printed: FLOPs by arithmetic, and measured times."""

FLOPS_HEAD = """
           TFLOPs, exact                      TFLOPs, the paper's         KV cache, GB
      N     full     SDTP  saved  ideal       full     SDTP  saved       full     SDTP"""


def print_flops(name, schedule, blocks, rows):
    """The rows of prune.flops_row under the schedule that they belong to."""
    after = schedule.after(blocks)
    dropped = 1 - schedule.share(len(after))
    print(f"{name}: {len(after)} stages after blocks {after}, keep {schedule.keep}: "
          f"{dropped:.0%} of the prompt dropped by the last")
    print(f"tokens per block at N = {rows[0]['n']}: {rows[0]['counts']}")
    print(FLOPS_HEAD)
    for row in rows:
        cells = f"{row['n']:7d}"
        for accounting in ("exact", "paper"):
            full, sdtp = row[accounting]
            cells += f" {full / 1e12:8.2f} {sdtp / 1e12:8.2f} {1 - sdtp / full:6.1%}"
            cells += f" {full / sdtp:5.2f}x  " if accounting == "exact" else "   "
        print(cells + " ".join(f"{size / 1e9:8.2f}" for size in row["kv_bytes"]))


def gigabytes(size):
    """A peak of memory, in GB; "-" where none is known."""
    return "-" if size is None else f"{size / 1e9:.2f}"


BENCH_HEAD = "      N  arm    prefill s (min to max)     decode ms  end to end s  peak GB    KV GB"
BAR = 60                            # columns of the slowest arm's bar


def print_bench(row):
    """A row of support.timing.bench_row: a line for each arm, the speed-up, and a bar each."""
    for name in ("full", "sdtp"):
        r = row[name]
        low, high = r["prefill_spread_s"]
        print(f"{row['n']:7d}  {name:4} {r['prefill_s']:10.3f} ({low:.3f} to {high:.3f})"
              f" {1e3 * r['decode_s']:12.2f} {r['e2e_s']:13.3f}"
              f" {gigabytes(r['peak_bytes']):>8} {r['kv_bytes'] / 1e9:8.3f}")
    speedup = row["speedup"]
    print(f"         prefill {speedup['prefill']:.2f}x as fast, {row['share_of_ideal']:.0%} of the "
          f"ideal by FLOPs, {row['ideal']:.2f}x; end to end {speedup['e2e']:.2f}x")
    print_bars(row, ("full", "sdtp"))


def print_bars(row, arms):
    """Each arm's time as a bar: = is prefill, - is decode."""
    longest = max(row[name]["e2e_s"] for name in arms)
    width = max(len(name) for name in arms)
    for name in arms:
        arm = row[name]
        prefill, whole = (round(BAR * arm[part] / longest) for part in ("prefill_s", "e2e_s"))
        bar = "=" * prefill + "-" * (whole - prefill)
        print(f"         {name:{width}} {bar} {arm['e2e_s']:.2f} s", flush=True)
