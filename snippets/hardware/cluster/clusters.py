"""Beyond some size, more GPUs do less work: failures eat the additional ones.

One GPU fails once in six years. A million of them fail every three minutes.
"""

from warpmap.hardware.cluster.clusters import best_interval, goodput

MTBF = 2112 * 24 * 60  # minutes, as in the training of Llama 3
CHECKPOINT = 1 / 6  # minutes

print("GPUs        restart: 10 min    2 min   useful, in thousands")
# -> GPUs        restart: 10 min    2 min   useful, in thousands
for k in (14, 16, 18, 20):
    gpus = 2**k
    row = f"{gpus:9,}"
    for restart in (10, 2):
        mtbf = MTBF / gpus
        interval = best_interval(CHECKPOINT, mtbf)
        useful = gpus * goodput(interval, CHECKPOINT, restart, mtbf)
        row += f"{useful / 1000:13.0f}"
    print(row)
# ->    16,384           15           16
# ->    65,536           48           58
# ->   262,144           93          185
# -> 1,048,576           23          367
