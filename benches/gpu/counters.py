#!/usr/bin/env python3
"""A line a kernel and grid, its last launch, out of what `ncu --csv --metrics` prints."""
import csv
import sys

SHORT = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
    "launch__occupancy_limit_shared_mem": "by shared memory",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
}
launches, head = {}, None
for row in csv.reader(open(sys.argv[1])):
    if "Metric Name" in row:   # every family begins with a head of its own
        head = row
        continue
    if head is None or len(row) != len(head):
        continue
    r = dict(zip(head, row))
    name, grid = r["Kernel Name"].split("(")[0], r["Grid Size"]
    launch = launches.setdefault((name, grid), {"kernel": f"{name} {grid.replace(', 1', '')}"})
    launch[SHORT.get(r["Metric Name"], r["Metric Name"])] = f"{r['Metric Value']} {r['Metric Unit'] if 'time' in r['Metric Name'] else ''}".strip()
print("| kernel | " + " | ".join(SHORT.values()) + " |\n| --- |" + " ---: |" * len(SHORT))
for launch in launches.values():
    print("| " + " | ".join(launch.get(name, "") for name in ("kernel", *SHORT.values())) + " |")
sys.exit(0 if launches else 1)
