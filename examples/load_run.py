"""Read a run's configuration, with settings laid over it, as the command line does."""

import sys

from stablemoe_ds import UserError, load_run

run = load_run(sys.argv[1], ["schedule.steps=100", "moe.router=switch"])
print(f"{run.name}: {run.moe.experts} experts, router {run.moe.router}, {run.schedule.steps} steps")
try:
    load_run(sys.argv[1], ["moe.ruoter=switch"])
except UserError as error:
    print(error)
