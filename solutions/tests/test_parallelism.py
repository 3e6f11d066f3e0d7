"""Lesson 6's reference: any grid of ranks gives one process's tokens, and nothing that befalls a rank goes unsaid."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.authoring.soak.load import drive
from common.authoring.soak.oracle import Oracle
from common.authoring.soak.requests import MAX_MODEL_LEN, Letters, random_asks, random_model
from common.checkpoints import Checkpoint, find_checkpoint
from common.config import EngineConfig
from common.course import ROOT
from common.workers import WorkerError
from solutions import engine as engine_module
from solutions import llama_pytorch, parallelism
from solutions.batching import Engine, SamplingParams, local_engine
from solutions.engine import build_runner, load_model, resolve, start_executor
from solutions.llama_pytorch import load
from solutions.parallelism import Group
from solutions.tests.faults import make_faulty_runner

STORIES = [list(range(5, 30)), [*range(5, 15), *range(30, 40)], [7] * 20]
FAMILIES = {
    "llama": dict(
        model_type="llama", num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=3, intermediate_size=23,
        vocab_size=41, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    "qwen2": dict(
        model_type="qwen2", num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=5, hidden_size=24,
        vocab_size=43, tie_word_embeddings=False,
    ),
    "qwen3": dict(
        model_type="qwen3", num_attention_heads=3, num_key_value_heads=3, head_dim=6, num_hidden_layers=4,
        vocab_size=40, tie_word_embeddings=True,
    ),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_hidden_layers=4,
        vocab_size=40, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[2],
        norm_topk_prob=True,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(engine_module, "load_tokenizer", lambda folder: Letters())


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder for each family, with a tiny random model of awkward sizes."""
    folders = {}
    for name, changes in FAMILIES.items():
        folders[name] = folder = tmp_path_factory.mktemp(name)
        config = dict(hidden_size=16, intermediate_size=24, max_position_embeddings=128) | changes
        model = random_model(1, **config)
        save_file(
            {key: tensor.detach().clone() for key, tensor in model.named_parameters()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folders


def whole_model(folder: Path) -> llama_pytorch.Llama:
    checkpoint = Checkpoint(folder)
    model = llama_pytorch.Llama(llama_pytorch.parse_config(checkpoint.config)).double()
    llama_pytorch.load_weights(model, checkpoint)
    return model


def grid_engine(folder: Path, tensor: int, pipeline: int, build=build_runner, **settings) -> Engine:
    """An engine whose ranks build their runners by `build(config, model, layers)`."""
    settings = {"timeout": 10.0, "dtype": torch.float64, "max_model_len": MAX_MODEL_LEN, **settings}
    grid = dict(tensor_parallel=tensor, pipeline_parallel=pipeline)
    config, tokenizer = resolve(EngineConfig(model=str(folder), device="cpu", **grid, **settings))
    executor = start_executor(config, partial(load_model, config), partial(build, config))
    return Engine(executor, tokenizer, config)


def same_tokens(folder: Path, tensor: int, pipeline: int, seed: int) -> dict:
    """Random load in a pool that is too small, prefix cache on, on this grid; everything is checked after each step."""
    rng = random.Random(seed)
    asks = random_asks(rng, list(range(5, 40)), STORIES, 16)
    needed = -(-max(len(ask.prompt) + ask.params.max_tokens for ask in asks) // 4)
    settings = dict(num_blocks=needed + 4, block_size=4, max_num_batched_tokens=rng.choice([5, 16, 64]))
    preemption = rng.choice(["swap", "recompute"])
    with grid_engine(folder, tensor, pipeline, preemption=preemption, **settings) as engine:
        report = drive(engine, asks, Oracle(whole_model(folder), Letters()), rng)
    assert report.counts["preemptions"] and report.counts["cached"]
    return report.counts


@pytest.mark.parametrize(("family", "tensor", "pipeline"), [("llama", 2, 1), ("qwen2", 1, 2), ("qwen3_moe", 2, 1)])
def test_same_tokens(checkpoints, family, tensor, pipeline):
    same_tokens(checkpoints[family], tensor, pipeline, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tensor", "pipeline"),
    [
        ("llama", 3, 1),
        ("llama", 1, 3),
        ("llama", 2, 2),
        ("qwen2", 2, 1),
        ("qwen2", 2, 2),
        ("qwen3", 2, 1),
        ("qwen3", 3, 1),
        ("qwen3", 1, 2),
        ("qwen3_moe", 2, 2),
        ("qwen3_moe", 3, 1),
    ],
)
def test_same_tokens_on_other_grids(checkpoints, family, tensor, pipeline):
    same_tokens(checkpoints[family], tensor, pipeline, 1)


REAL = dict(num_blocks=10, block_size=8, max_num_batched_tokens=24)


@pytest.fixture(scope="module")
def real():
    """SmolLM2 in float32: (model, tokenizer, prompts, params, the tokens of one process)."""
    if os.environ.get("COURSE_REAL_MODEL") != "1":
        pytest.skip("set COURSE_REAL_MODEL=1 for the real model")
    model, tokenizer = load("smollm2-135m", torch.float32, "cpu")
    text = "The river was wide and slow, and nobody in the village had ever crossed it. One morning"
    story = tokenizer.encode(text)
    prompts = [story[: 6 + 4 * i] for i in range(3)] + [story]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with local_engine(model, tokenizer, **REAL) as engine:
        outputs = engine.generate(prompts, params, progress=False)
    return model, tokenizer, prompts, params, [output.token_ids for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_real_model(real, tensor, pipeline, monkeypatch):
    """Nine heads in three groups: the tokens of one process, up to the first near-tie."""
    model, tokenizer, prompts, params, expected = real
    monkeypatch.setattr(engine_module, "load_tokenizer", lambda folder: tokenizer)
    settings = REAL | {"dtype": torch.float32, "timeout": 30.0}
    with grid_engine(find_checkpoint("smollm2-135m"), tensor, pipeline, max_model_len=None, **settings) as engine:
        outputs = engine.generate(prompts, params, progress=False)
        assert engine.metrics().num_preemptions > 0
    for prompt, output, wanted in zip(prompts, outputs, expected):
        if output.token_ids != wanted:
            same = next(i for i, (a, b) in enumerate(zip(output.token_ids, wanted)) if a != b)
            with torch.inference_mode():
                top = llama_pytorch.recompute(model, prompt + wanted[:same]).topk(2).values
            assert top[0] - top[1] < 1e-3, f"token {same} of a prompt of {len(prompt)} differs, and it was no tie"


# --- What is read, what is refused, what overlaps ---------------------------------------------------------------------


def test_each_rank_reads_its_own(checkpoints):
    """Summed over a tensor-parallel pair: every tensor once, what both need whole twice. Stages share nothing but the
    final norm, and the table where it is the head as well.
    """
    folder = checkpoints["qwen2"]
    checkpoint = Checkpoint(folder)
    sizes = {name: checkpoint.read(name).nbytes for name in checkpoint.names()}
    twice = sum(size for name, size in sizes.items() if "norm" in name)
    with grid_engine(folder, 2, 1) as engine:
        assert sum(engine.executor.num_bytes_read) == sum(sizes.values()) + twice
        assert max(engine.executor.num_bytes_read) < 0.75 * sum(sizes.values())
    with grid_engine(folder, 1, 2) as engine:
        assert sum(engine.executor.num_bytes_read) == sum(sizes.values()) + sizes["model.norm.weight"]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "says"),
    [
        (4, 1, ["tensor_parallel is 4", "3 attention heads in 3 groups", "1, 2, 3"]),
        (1, 5, ["pipeline_parallel is 5", "4 layers", "1 to 4"]),
        (0, 1, ["tensor_parallel must be", "it is 0"]),
        (1, 1.5, ["pipeline_parallel must be", "it is 1.5"]),
    ],
)
def test_sizes_that_cannot_be(checkpoints, tensor, pipeline, says):
    with pytest.raises(ValueError) as refused:
        grid_engine(checkpoints["qwen3"], tensor, pipeline)
    assert all(word in str(refused.value) for word in says), str(refused.value)


def test_bad_settings_start_nothing(checkpoints, monkeypatch):
    monkeypatch.setattr("solutions.parallelism.start_ranks", lambda *_: pytest.fail("a worker was started"))
    with pytest.raises(ValueError, match="block_size"):
        grid_engine(checkpoints["qwen3"], 2, 1, block_size=0)


def test_two_batches_in_flight(checkpoints):
    """With two stages, half of the requests are in each of two steps under way."""
    with grid_engine(checkpoints["qwen3"], 1, 2) as engine:
        submit, seen = engine.executor.submit, []

        def watch(plan):
            submit(plan)
            seen.append((len(plan.scheduled), len(engine.in_flight)))

        engine.executor.submit = watch
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        engine.generate([[5 + i, 6, 7] for i in range(6)], params, progress=False)
    assert max(in_flight for _, in_flight in seen) == 2
    assert [number for number, _ in seen].count(3) >= 14, seen


def test_memory_is_that_of_each_rank(checkpoints):
    """With the same memory for each, two ranks hold about twice the blocks."""
    settings = dict(kv_cache_memory=200_000, max_num_seqs=1000, max_model_len=None)
    with local_engine(whole_model(checkpoints["qwen3"]), Letters(), **settings | {"max_model_len": 128}) as engine:
        alone = engine.config.num_blocks
    with grid_engine(checkpoints["qwen3"], 3, 1, **settings) as engine:
        assert engine.config.num_blocks in (3 * alone, 3 * alone + 1, 3 * alone + 2)


# --- What may befall a rank -------------------------------------------------------------------------------------------

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def nobody_is_left(pids: list[int], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def generate_until_error(engine: Engine) -> str:
    with pytest.raises(WorkerError) as error:
        while True:
            engine.generate(PROMPTS, PARAMS, progress=False)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "tensor", "pipeline", "rank"),
    [
        ("raise", 2, 1, 0),  # rank 0 is this process: it does not exit, and does not hang
        ("exit", 2, 1, 1),
        ("hang", 1, 2, 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("raise", 2, 1, 1), ("raise", 1, 2, 1)]),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("exit", 1, 2, 1), ("hang", 2, 1, 1)]),
    ],
)
def test_a_rank_that_fails(checkpoints, what, tensor, pipeline, rank):
    """It raises, ends, or never comes to an end, in its third step: an error that says so, and nobody left."""
    build = partial(make_faulty_runner, rank, 3, what)
    timeout = 3.0 if what == "hang" and tensor > 1 else 600.0  # what does not hang is noticed at once
    with grid_engine(checkpoints["qwen3"], tensor, pipeline, build, timeout=timeout) as engine:
        if what == "hang" and tensor == 1:  # no rank waits in the middle of a step: rank 0 waits for its result
            engine.executor.timeout = 1.0
        pids = [process.pid for process in engine.executor.workers.processes.values()]
        text = generate_until_error(engine)
        assert f"rank {rank}" in text
        if what == "raise":
            assert "ValueError" in text and "the numbers are too large" in text
        if what == "exit":
            assert "exit code 3" in text
        assert nobody_is_left(pids)
        with pytest.raises(WorkerError, match=f"is down: .*rank {rank}"):
            engine.generate(PROMPTS, PARAMS, progress=False)


@pytest.mark.parametrize(("tensor", "pipeline", "rank"), [(1, 2, 1), pytest.param(2, 1, 0, marks=pytest.mark.slow)])
def test_a_request_that_cannot_be_sampled(checkpoints, tensor, pipeline, rank):
    """An error of any kind while one request is sampled, on whichever rank, ends that request and no other."""
    build = partial(make_faulty_runner, rank, 0, "sample")
    with grid_engine(checkpoints["qwen3"], tensor, pipeline, build) as engine:
        first, bad, last = engine.generate(PROMPTS, PARAMS, progress=False)
        assert bad.finish_reason == "error" and "TypeError: 'float' object" in bad.error
        assert [len(output.token_ids) for output in (first, last)] == [40, 40]
        assert engine.generate([PROMPTS[0]], PARAMS, progress=False)[0].token_ids == first.token_ids


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 1)])
def test_the_fault_of_one_request_reaches_no_other(checkpoints, tmp_path, tensor, pipeline):
    """NaN in its keys and values, in eight bits too; a logits processor that cannot be sent to another rank."""
    shutil.copytree(checkpoints["qwen2"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][39] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    settings = dict(num_blocks=12, block_size=4, kv_cache_dtype="int8")
    params = SamplingParams(max_tokens=4, ignore_eos=True, stop_token_ids=[39])
    prompts = [list(range(5, 5 + n)) for n in (3, 9)]
    with grid_engine(tmp_path, tensor, pipeline, **settings) as engine:
        expected = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
        for prompt, fault, says in (
            ([39, *range(5, 25)], params, "NaN"),
            ([39, 5, 6], params, "NaN"),
            ([5, 6], replace(params, logits_processors=[lambda output, scores: scores[:0]]), ""),
        ):
            broken, *others = engine.generate([prompt, *prompts], [fault, params, params], progress=False)
            assert broken.finish_reason == "error" and says in broken.error
            assert [output.token_ids for output in others] == expected
        assert pipeline == 1 or "cannot be sent to the process that samples: Can't " in broken.error
        assert [output.token_ids for output in engine.generate(prompts, params, progress=False)] == expected


def test_a_slice_is_added_up_as_it_is(monkeypatch):
    """gloo reads the memory of a tensor from its first number on, whatever its strides are."""

    def all_reduce(x: torch.Tensor, op, group) -> None:
        x.as_strided((x.numel(),), (1,)).mul_(2)  # as gloo would, with two ranks that have the same numbers

    monkeypatch.setattr(parallelism.dist, "all_reduce", all_reduce)
    y = torch.arange(8.0).view(2, 4)
    assert torch.equal(Group(0, (0, 1)).all_reduce(y[:, 1:3]), torch.tensor([[2.0, 4.0], [10.0, 12.0]]))
    assert torch.equal(y, torch.tensor([[0.0, 2.0, 4.0, 3.0], [4.0, 10.0, 12.0, 7.0]]))


@pytest.mark.slow
def test_an_engine_that_was_dropped(checkpoints):
    """Without `close`, its workers end and the next engine starts; while it is held, a sentence says what to do."""
    engine = grid_engine(checkpoints["qwen3"], 2, 1)
    pids = [process.pid for process in engine.executor.workers.processes.values()]
    engine.circle = engine  # so that only the garbage collector can end it
    with pytest.raises(ValueError, match="Another parallel engine is open in this process.*Call its close()"):
        grid_engine(checkpoints["qwen3"], 2, 1)
    expected = engine.generate(PROMPTS, PARAMS, progress=False)[0].token_ids
    del engine
    with grid_engine(checkpoints["qwen3"], 1, 2) as following:
        assert following.generate(PROMPTS, PARAMS, progress=False)[0].token_ids == expected
        assert nobody_is_left(pids)


def trials(default: int) -> range:
    return range(int(os.environ.get("FAULT_TRIALS", default)))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("trial", trials(3))
def test_killed_or_stopped_at_any_time(checkpoints, sent, trial):
    """kill -9 and SIGSTOP on a random rank at a random time: a clear error in time, and nobody left.

    FAULT_TRIALS=10 for ten of each.
    """
    rng = random.Random(trial * 100 + sent)
    tensor, pipeline = [(2, 1), (1, 2), (3, 1), (2, 2)][trial % 4]
    timeout = 600.0 if sent == signal.SIGKILL else 3.0
    with grid_engine(checkpoints["qwen3"], tensor, pipeline, timeout=timeout) as engine:
        processes = engine.executor.workers.processes
        rank = rng.choice(list(processes))
        killer = threading.Timer(rng.uniform(0, 1.5), processes[rank].send_signal, [sent])
        killer.start()
        text = generate_until_error(engine)
        killer.join()
        assert f"rank {rank} " in text, text
        assert ("SIGKILL" if sent == signal.SIGKILL else "does not answer") in text, text
        assert nobody_is_left([process.pid for process in processes.values()])


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
from solutions import engine, parallelism
from common.authoring.soak.load import Letters
from solutions.llama_pytorch import SamplingParams
engine.load_tokenizer = lambda folder: Letters()
with engine.InferenceEngine({folder!r}, tensor_parallel={tensor}, pipeline_parallel={pipeline}, dtype=torch.float64,
                            device="cpu", timeout=3.0, max_model_len=64) as engine:
    print(*[process.pid for process in engine.executor.workers.processes.values()], flush=True)
    {first}
    while True:
        engine.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=40, ignore_eos=True), progress=False)
        if not sys.stdout.closed:
            print("answered")
            sys.stdout.close()
"""

# Within a step the other rank waits for rank 0, for its part of a sum; between two steps it waits for nobody.
STOP_WITHIN_A_STEP = """
    def all_reduce(*arguments, add=parallelism.Group.all_reduce, calls=[]):
        calls.append(1)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGSTOP)
        return add(*arguments)

    parallelism.Group.all_reduce = all_reduce
"""


def run_script(folder: Path, tensor: int, pipeline: int, first: str = "") -> tuple[subprocess.Popen, list[int]]:
    """An engine in a process of its own, busy without end; and the process ids of its workers."""
    script = SCRIPT.format(root=str(ROOT), folder=str(folder), tensor=tensor, pipeline=pipeline, first=first)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_rank_0_is_killed(checkpoints, tensor, pipeline):
    process, workers = run_script(checkpoints["qwen3"], tensor, pipeline)
    assert process.stdout.readline() == "answered\n"
    process.kill()
    process.wait()
    assert workers and nobody_is_left(workers)


@pytest.mark.slow
def test_rank_0_is_stopped_for_a_while(checkpoints):
    """When it goes on, it finds that the others have given up, and says so."""
    process, workers = run_script(checkpoints["qwen3"], 2, 1, STOP_WITHIN_A_STEP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert nobody_is_left(workers)  # they have waited for three seconds
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=120)
    assert "WorkerError" in error and "rank 1" in error


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_ctrl_c_ends_every_process(checkpoints, tensor, pipeline):
    process, workers = run_script(checkpoints["qwen3"], tensor, pipeline)
    assert process.stdout.readline() == "answered\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in error and "WorkerError" not in error
    assert nobody_is_left(workers)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2)])
def test_ctrl_c_loses_nothing(checkpoints, tensor, pipeline):
    """The answers so far end there; the engine, and its workers, go on with the next."""
    folder = checkpoints["qwen3"]
    with grid_engine(folder, tensor, pipeline) as engine:
        expected = [output.token_ids for output in engine.generate(PROMPTS, PARAMS, progress=False)]
        for _ in range(3):
            timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT])
            with pytest.raises(KeyboardInterrupt):
                timer.start()  # here, where the interrupt is caught however late this thread goes on
                while True:
                    engine.generate(PROMPTS, PARAMS, progress=False)
            timer.join()
        got = [output.token_ids for output in engine.generate(PROMPTS, PARAMS, progress=False)]
        assert got == expected
        assert engine.manager.pool.num_free_blocks == len(engine.manager.pool.blocks)


@pytest.mark.slow
def test_idling_is_no_failure(checkpoints):
    """Nothing is computed for longer than the ranks would wait for each other within a step. On a busy machine a step
    may take a second; then the ranks wait for longer.
    """
    for timeout in (1.0, 5.0, 25.0):
        with contextlib.suppress(WorkerError), grid_engine(checkpoints["qwen3"], 2, 1, timeout=timeout) as engine:
            first = engine.generate(PROMPTS, PARAMS, progress=False)
            time.sleep(1.5 * timeout)
            second = engine.generate(PROMPTS, PARAMS, progress=False)
            break
    else:
        pytest.fail("after a pause every engine was down")
    assert [output.token_ids for output in first] == [output.token_ids for output in second]


# --- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun(*options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "common", "run", "--model", "tales"]
    command += ["--prompt", "Anna and the wolf", "--max-tokens", "12", "--tensor-parallel", "2"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def one_process() -> str:
    command = [sys.executable, "-m", "common", "run", "--model", "tales", "--prompt", "Anna and the wolf"]
    done = subprocess.run([*command, "--max-tokens", "12"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.partition("\n\n")[0]


@pytest.mark.slow
def test_torchrun_on_one_machine():
    launcher = torchrun("--standalone", "--nproc-per-node", "2")
    output, error = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, error
    assert output.partition("\n\n")[0] == one_process()


@pytest.mark.slow
def test_torchrun_on_two_machines():
    """Two rendezvous agents, as on two machines, which meet on this one's loopback: at a port that is held from the
    moment on when it was chosen.
    """
    meeting = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "is_host=false"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{meeting.port}", "--rdzv-id", "course", "--local-addr", "127.0.0.1"]
    launchers = [torchrun(*options) for _ in range(2)]
    outputs = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], [error for _, error in outputs]
    texts = sorted(output.partition("\n\n")[0] for output, _ in outputs)
    assert texts == ["", one_process()]
