"""Two lines change places, and an edit costs 2 MB instead of 6 GB.

Without a .dockerignore a commit costs 6 GB too, though no file was edited.
"""

from warpmap.tools.environments.docker import rebuild_cost

code_first = """\
FROM python:3.12-slim-bookworm
WORKDIR /app
COPY . .
RUN pip install torch==2.13.0
CMD ["python", "train.py"]
"""
lines = code_first.splitlines()
lines[2], lines[3] = lines[3], lines[2]
code_last = "\n".join(lines)

# megabytes: say 2 of code, and 6,000 of PyTorch with its CUDA libraries
costs = {"COPY": 2, "RUN pip": 6000}

for dockerfile in (code_first, code_last):
    print("edit: ", rebuild_cost(dockerfile, costs, ["train.py"]), "MB")
# -> edit:  6002 MB
# -> edit:  2 MB

for ignore in ("", ".git"):
    commit = [".git/HEAD", ".git/index"]
    print("commit:", rebuild_cost(code_first, costs, commit, ignore), "MB")
# -> commit: 6002 MB
# -> commit: 0 MB
