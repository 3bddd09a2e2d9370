"""The recipes of launch/: the scripts are bash, what they and the page name exists, and a SLURM job of two processes,
told what srun would tell them, trains, is preempted, goes back into the queue and finishes."""
import ast
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine import write_images
from jax._src.clusters import ClusterEnv

from transferlab import cli, experiment
from transferlab.backbones.weights import save_weights

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sbatch")) + sorted((ROOT / "launch").glob("*.sh"))
PAGE = (ROOT / "launch" / "README.md").read_text()
SBATCH = (ROOT / "launch" / "slurm.sbatch").read_text()
FIRST_PORT = 65535 - 2**12 + 1  # of those among which jax picks one, by the job's number

# srun, as far as the job needs it: every task is told its place, lines are labelled, the highest exit code is its own.
# The first time all tasks, and nobody else, are sent SIGTERM once they train, as --signal does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NODELIST=localhost "$@" > >(sed -u "s/^/$i: /") 2>&1 &
  tasks+=($!)
done
if [[ -z ${SLURM_RESTART_COUNT:-} ]]; then
  until [[ -s $TRAINS ]] || ! kill -0 "${tasks[0]}"; do sleep 0.02; done
  kill -TERM "${tasks[@]}"
fi
highest=0
for task in "${tasks[@]}"; do
  wait "$task"
  code=$?
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
# gcloud, which says what it is told and runs the command as a worker of its own would.
GCLOUD = """#!/bin/bash
printf "%s\\n" "${@:1:$#-1}"
cd "$HOME"
command="${@: -1}"
exec bash -c "${command#--command=}"
"""
CONFIG = """
from transferlab.experiment import arguments, defaults

def get_config(text=None):
  arg = arguments(text, data="", backbone="")
  config = defaults("linear", data=arg.data, backbone=arg.backbone)
  config.duration, config.batch_size, config.log_every = "120 steps", 8, "5 steps"
  return config
"""


def write_program(folder: Path, name: str, text: str) -> None:
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(text)
  (folder / name).chmod(0o755)


def free_job() -> int:
  """The number of a job whose port nobody listens on now."""
  for job in range(os.getpid() % 4000, 4096):
    with socket.socket() as listener:
      if listener.connect_ex(("127.0.0.1", FIRST_PORT + job)):
        return job
  raise RuntimeError("all of jax's ports are taken")


@pytest.fixture
def job(tmp_path, tiny_weights):
  """run(**environment) -> (exit code, lines of output, jobs that were requeued): the script as Slurm would start it."""
  save_weights(tiny_weights, tmp_path / "tiny.safetensors")
  write_images(tmp_path / "images", count=16)
  (tmp_path / "config.py").write_text(CONFIG)
  programs, queued = tmp_path / "bin", tmp_path / "queued"
  write_program(programs, "srun", SRUN)
  write_program(programs, "scontrol", f'#!/bin/bash\necho "$@" >> {queued}\n')
  write_program(programs, "transferlab", f'#!/bin/bash\nexec {sys.executable} -m transferlab.cli "$@"\n')
  number, flags = free_job(), "--xla_backend_optimization_level=0"
  told = {"SLURM_JOB_ID": str(number), "SLURM_NTASKS": "2", "PATH": f"{programs}:{os.environ['PATH']}",
          "TRAINS": str(tmp_path / "run" / "metrics.jsonl"), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
          "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": flags,
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
  command = ["bash", ROOT / "launch" / "slurm.sbatch", "train", "--workdir=run",
             f"--config=config.py:data=folder:{tmp_path / 'images'},backbone=tiny.safetensors"]
  def run(**more):
    ended = subprocess.run(command, cwd=tmp_path, env={**plain, **told, **more}, capture_output=True, text=True,
                           timeout=200)
    asked = queued.read_text().splitlines() if queued.exists() else []
    return ended.returncode, (ended.stdout + ended.stderr).splitlines(), asked
  run.number, run.folder, run.compiled = number, tmp_path / "run", tmp_path / ".cache" / "transferlab" / "compiled"
  return run


def promised(heading: str) -> list[str]:
  """Patterns of the lines that a section of the page promises, up to what a run's own data decide."""
  block = re.search(rf"^## {heading}$.*?^```text\n(.*?)^```", PAGE, re.M | re.S)[1]
  starts = [re.escape(re.split(r"…|\(", line)[0]) for line in block.splitlines()]
  return [re.sub(r"\d+(?!:)", r"\\d+", start).replace("lora", r"\w+") for start in starts]


def test_a_slurm_job_is_preempted_requeued_and_finishes(job):
  code, lines, queued = job()
  rest = iter(lines)
  assert all(any(re.match(start, line) for line in rest) for start in promised("SLURM")), lines  # in this order
  assert code == 75 and queued == [f"requeue {job.number}"], lines
  assert any("fresh run" in line for line in lines) and not (job.folder / "result.json").exists()
  assert any("jit_step" in path.name for path in job.compiled.iterdir())
  code, lines, queued = job(SLURM_RESTART_COUNT="1")
  assert code == 0 and len(queued) == 1, lines
  assert any(re.fullmatch(r"0: resumed at step \d+ of 120", line) for line in lines), lines
  assert f"0: {job.folder.name}/adapter.safetensors" in lines and (job.folder / "adapter.safetensors").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
  assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
  if shutil.which("shellcheck"):
    found = subprocess.run(["shellcheck", "--shell=bash", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_slurm_gives_each_process_the_gpu_that_jax_takes(monkeypatch):
  options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SBATCH, re.M))
  nodes, tasks, gpus = (int(options[name]) for name in ("nodes", "ntasks-per-node", "gpus-per-node"))
  assert tasks == gpus and "gpus-per-task" not in SBATCH and "--gpu-bind=none" in SBATCH
  head = re.split(r"\n(?!#|\n)", SBATCH)[0]  # Slurm reads no option below the first command
  assert head.count("#SBATCH") == SBATCH.count("#SBATCH") == len(options) + 1
  monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", False)
  for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR"))]:
    monkeypatch.delenv(name)
  told = {"SLURM_JOB_ID": 4101, "SLURM_NTASKS": nodes * tasks, "SLURM_STEP_NODELIST": "gpu[007,012]",
          "SLURM_PROCID": tasks + 1, "SLURM_LOCALID": 1}  # the second task of the second node
  for name, value in told.items():
    monkeypatch.setenv(name, str(value))
  found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
  assert found == (f"gpu007:{FIRST_PORT + 5}", nodes * tasks, tasks + 1, [1])


def test_the_words_of_a_command_reach_all_workers_of_a_pod(tmp_path):
  worker = tmp_path / "worker"
  write_program(tmp_path / "bin", "gcloud", GCLOUD)
  (worker / "transferlab" / ".venv" / "bin").mkdir(parents=True)
  write_program(worker / "transferlab" / ".venv" / "bin", "transferlab", '#!/bin/bash\nprintf "<%s>\\n" "$@"\n')
  env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(worker)}
  run = lambda *argv, **more: subprocess.run([ROOT / "launch" / "tpu_pod.sh", *argv], env={**env, **more},
                                             capture_output=True, text=True)
  place = {"PROJECT": "p", "ZONE": "z", "TPU": "t"}
  words = ["train", "--config.duration=20 epochs", "--config.optim.decay=(('.*bias', 0.0),)", "--workdir=/shared/a b"]
  lines = run(*words, **place).stdout.splitlines()
  assert lines[:8] == ["compute", "tpus", "tpu-vm", "ssh", "t", "--project=p", "--zone=z", "--worker=all"]
  assert lines[8:] == [f"<{word}>" for word in [*words, "--distributed"]]
  assert run("train").stderr.strip().endswith("PROJECT: is not set: the Google Cloud project")
  assert run(**place).returncode == 2 and "no verb is given" in run(**place).stderr


def test_flags_and_keys_of_the_recipes_exist(capsys):
  text = "\n".join([PAGE, *(path.read_text() for path in SCRIPTS)]).replace("\\\n", " ")
  calls = re.findall(r"(?:transferlab|slurm\.sbatch|tpu_pod\.sh) (\w+) ((?:[^\n`]*))", text)
  calls = [(verb, rest) for verb, rest in calls if verb in cli.VERBS]
  assert {"train", "sweep"} <= {verb for verb, _ in calls}
  for verb, rest in calls:
    with pytest.raises(SystemExit):
      cli.main(["transferlab", verb, "--help"])
    known = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M))
    used = set(re.findall(r"(?<!\S)\"?--(\w+)(?=[=\s]|$)", rest))
    assert used <= known, (verb, rest, used - known)
  config = experiment.defaults("lora")
  for key in set(re.findall(r"--config\.([a-z_.]+)", text)):
    group, _, last = key.rpartition(".")
    assert last in (config[group] if group else config), key
  assert all((ROOT / path).exists() for path in re.findall(r"(?<![\w/])(?:configs|launch|colab)/[\w.]+\w", text))


def texts(path: Path):
  """Every text of a source file, with … for what is put in."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.JoinedStr):
      yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value


def test_messages_of_the_page_are_ours():
  known = "\n".join(text for path in sorted((ROOT / "transferlab").glob("*.py")) for text in texts(path))
  rows = re.findall(r"^\| (`.*?) \| ", PAGE, re.M)
  messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row) if " " in message]
  assert len(messages) > 10
  for message in messages:
    if not message.startswith("error:"):
      assert message.removesuffix("…") in known, message
