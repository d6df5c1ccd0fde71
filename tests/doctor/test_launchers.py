"""What is in front of a training program is peeled off, and what it sets on the way is kept."""

from __future__ import annotations

import shlex

import pytest

from fp16_patch.doctor.launchers import ELSEWHERE, RUNNERS, STARTER_MODULES, STARTERS, TOOLS, Program, program_of

PPO, SFT = "verl.trainer.main_ppo", "openrlhf.cli.train_sft"


def read(command: str) -> Program:
    return program_of(shlex.split(command))


@pytest.mark.parametrize(
    "front",
    [
        "python -m",
        "python3 -u -m",
        "/opt/env/bin/python3.11 -X dev -W ignore -m",
        "torchrun --standalone --nnodes 1 --nproc-per-node=8 -m",
        "torchrun --rdzv_endpoint host.name:29500 --module",
        "python -m torch.distributed.run --nproc_per_node 8 -m",
        "deepspeed --module",
        "deepspeed --hostfile hosts --num_gpus 8 --module",
        "accelerate launch --config_file a.yaml --multi_gpu -m",
        "uv run -m",
        "uv run --with torch --extra gpu python -m",
        "uv run torchrun --nproc-per-node 8 -m",
        "srun --nodes 2 --ntasks-per-node=1 -N2 --job-name ppo python -m",
        "srun -l torchrun --nnodes 2 -m",
        "mpirun -np 8 --mca btl tcp,self -x PATH python -m",
        "nohup nice -n 10 timeout 30h numactl --cpunodebind 0 python -m",
        "conda run -n rl --no-capture-output python -m",
        "python -m debugpy --listen 5678 -m",
        "coverage run --branch -m",
    ],
)
def test_a_module_is_found_behind_its_launchers_with_its_own_arguments(front: str) -> None:
    program = read(f"{front} {PPO} a.b=c --flag 1 x=y.py")
    assert (program.name, program.is_module) == (PPO, True)
    assert program.arguments == ("a.b=c", "--flag", "1", "x=y.py")
    assert program.problems == ()


@pytest.mark.parametrize(
    "front",
    ["python", "python3 -u", "torchrun --standalone", "deepspeed --num_gpus 8", "uv run --with x", "srun python"],
)
def test_a_script_is_found_the_same_way(front: str) -> None:
    program = read(f"{front} verl/trainer/main_ppo.py a=b -m c")
    assert (program.name, program.is_module) == ("verl/trainer/main_ppo.py", False)
    assert program.arguments == ("a=b", "-m", "c")


def test_each_row_of_the_tables_is_peeled() -> None:
    wrappers = [*TOOLS.split(), *(f"{runner} run" for runner in RUNNERS.split()), "nsys profile"]
    starters = [" ".join((*words, options[0])) for words, options in STARTERS.items()]
    starters += [f"python -m {module} {options[0]}" for module, options in STARTER_MODULES.items()]
    for front in [*(f"{wrapper} python -m" for wrapper in wrappers), *starters]:
        assert read(f"{front} {SFT} --x").name == SFT, front


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (f"A=b C='d e' python -m {PPO}", {"A": "b", "C": "d e"}),
        (f"env -u X FP16_PATCH=bf16 python -m {PPO}", {"FP16_PATCH": "bf16"}),
        (f"A=1 env A=2 nohup python -m {PPO}", {"A": "2"}),
        (f"bash -c 'export A=b; python -m {PPO}'", {"A": "b"}),
    ],
)
def test_variables_that_are_set_on_the_way_are_kept(command: str, environment: dict[str, str]) -> None:
    assert (read(command).name, read(command).environment) == (PPO, environment)


@pytest.mark.parametrize(
    "text",
    [
        f"python -m {PPO} a=b",
        f"set -x; cd /data && A=b python -m {PPO} a=b 2>&1 | tee run.log",
        f"ray start --head\npython -m {PPO} a=b > run.log",
        f"(python -m {PPO} a=b)",
    ],
)
def test_a_shells_words_are_read(text: str) -> None:
    program = program_of(["bash", "-euxc", text])
    assert (program.name, program.arguments) == (PPO, ("a=b",))


@pytest.mark.parametrize("submitter", [" ".join(words) for words in ELSEWHERE])
def test_what_runs_elsewhere_is_told_where_to_put_us(submitter: str) -> None:
    (problem,) = read(f"{submitter} --option value -- python -m {PPO} a=b").problems
    where = "in the caller's environment, and the command gets another" if submitter == "sudo" else ""
    assert str(problem).startswith(
        f"command={submitter}: the plan would stay {where or 'with the submitting client'}. Fix: turn it round:"
    )
    assert "fp16-patch run -- python" in problem.fix
    inner = read(f"{submitter} -- fp16-patch run --mode bf16 -- python -m {PPO} a=b")
    assert (inner.name, inner.mode, inner.problems) == (PPO, "bf16", ())


def test_a_submission_is_found_behind_another_launcher() -> None:
    assert read(f"srun -N1 ray job submit -- python -m {PPO}").problems


@pytest.mark.parametrize("ours", ["fp16-patch run --mode=observe --", "python -m fp16_patch run --mode observe --"])
def test_our_own_command_in_front_is_peeled_with_its_mode(ours: str) -> None:
    assert (read(f"{ours} python -m {PPO}").name, read(f"{ours} python -m {PPO}").mode) == (PPO, "observe")


@pytest.mark.parametrize(
    "command",
    ["", "bash train.sh", "python -c 'print(1)'", "python -", "make", "torchrun", "srun", "python -m", "./train"],
)
def test_what_names_no_program_has_none(command: str) -> None:
    assert read(command).name is None
    assert program_of(["bash", "-c", 'echo "unbalanced']).name is None
