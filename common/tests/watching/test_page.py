"""The page in a real browser: Debian's Chromium, driven by Playwright, on traces of a tiny engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.student.watch_exercise import watch
from common.tests.browser import PHONE, WIDE, chromium, expect  # noqa: F401  (the fixture `browser`)
from common.tests.student.test_watch_exercise import planted
from common.tests.watching.test_watching import ask, run, tiny_engine
from common.watching import read_trace, recording, totals
from common.watching.page import make_page

pytestmark = pytest.mark.slow


def record(file: Path, spoil=None, **options):
    """Run a tiny engine and return it. spoil(engine): changes it before the run."""
    engine = tiny_engine(**options)
    if spoil:
        spoil(engine)
    with file.open("w", encoding="utf-8") as lines:
        run(engine, lines)
    return engine


@pytest.fixture(scope="module")
def swapping(tmp_path_factory):
    """An engine and its trace, with preemption by swap, prefix hits, four samples and draft tokens."""
    file = tmp_path_factory.mktemp("page") / "run.jsonl"
    return record(file, preemption="swap"), file


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of a trace from a file. Nothing may be fetched, and no script may fail."""
    contexts, failures = [], []

    def open(trace: Path, other: Path | None = None, size=WIDE, scheme="light", what="step"):
        html = tmp_path / "page.html"
        html.write_text(make_page(trace, other), encoding="utf-8")
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or failures.append(request.url))
        page.goto(html.as_uri())
        expect(page.locator("#where")).to_contain_text(f"{what} 1 of")
        return page

    yield open
    for context in contexts:
        context.close()
    assert failures == []


expect.set_options(timeout=120_000)


def settle(page) -> None:
    """Wait for the pictures, and then for the texts, which follow within a tenth of a second."""
    page.evaluate(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 150))))"
    )


def test_the_page_s_numbers_are_the_engine_s(open_page, swapping) -> None:
    engine, file = swapping
    page, metrics, trace = open_page(file), engine.metrics(), read_trace(file)
    found = page.evaluate("page.run.totals()")
    assert found == {name: pytest.approx(getattr(metrics, name), rel=1e-4) for name in found} and len(found) == 13
    rows = page.evaluate(
        "page.run.steps.map((s) => [s.free, s.running, s.waiting, s.stored, s.entries.map((e) => e.kind)])"
    )
    expected = [
        [s.num_free, s.num_running, s.num_waiting, s.num_stored, [entry.kind for entry in s.entries]]
        for s in trace.steps
    ]
    assert rows == expected
    halfway = len(trace.steps) // 2
    trace.steps, trace.lines = (
        trace.steps[: halfway + 1],
        trace.lines[: trace.lines.index(trace.steps[halfway].result) + 1],
    )
    early = page.evaluate(f"page.run.totals({halfway})")
    assert early == {name: pytest.approx(getattr(totals(trace), name), rel=1e-4) for name in early}
    page.keyboard.press("End")
    expect(page.locator("#where")).to_have_text(f"step {metrics.num_steps} of {metrics.num_steps}")
    settle(page)
    shown = dict(zip(page.locator("#totals dt").all_text_contents(), page.locator("#totals dd").all_text_contents()))
    assert shown["tokens out"] == str(metrics.num_output_tokens) and shown["finished"] == "35"
    assert shown["prefix hits"] == f"{metrics.hit_rate:.0%}".replace("%", " %")
    assert shown["drafts accepted"] == f"{metrics.acceptance_rate:.0%}".replace("%", " %")
    assert shown["slots/token"] == f"{metrics.slots_per_token:.2f}"


def test_the_state_of_a_step_is_the_same_from_wherever_one_comes(open_page, swapping) -> None:
    page = open_page(swapping[1])
    jump = """(order) => order.map((i) => {
        const s = page.run.state(i);
        const maps = [s.tables, s.computed, s.hosts].map((each) => [...each].sort());
        return JSON.stringify([[...s.counts], s.hashes, maps, s.free]);
    })"""
    steps = page.evaluate("page.run.steps.length")
    forward = page.evaluate(jump, list(range(steps)))
    assert page.evaluate(jump, list(reversed(range(steps)))) == forward[::-1]
    assert len(set(forward)) > steps // 2


def test_it_is_driven_by_keys_alone(open_page, swapping) -> None:
    page = open_page(swapping[1])
    for key, index in (("ArrowRight", 1), ("Shift+ArrowRight", 11), ("ArrowLeft", 10), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate("page.index") == index
    page.keyboard.press("p")
    settle(page)
    expect(page.locator("#events")).to_contain_text("is preempted")
    assert page.evaluate("page.run.steps[page.index].plan.preempt.some(([victim]) => victim === page.chosen)")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("b")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#block")).to_contain_text("Block 1:")
    page.keyboard.press("End")
    expect(page.locator("#block")).to_contain_text("Block 23:")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Stop")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Play")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"play", "back", "step", "speed", "preemption", "zoom", "grid", "chosen", "In words"} <= reached


def test_every_picture_has_its_words(open_page, swapping) -> None:
    page = open_page(swapping[1])
    for words in page.locator(".words").all():
        if words.get_attribute("open") is None:
            words.locator("summary").click()
    page.evaluate("page.go(14); page.choose(3)")
    settle(page)
    entry = page.evaluate("page.run.steps[14].entries[0]")
    row = page.locator("#entries tr").nth(1)
    expect(row).to_contain_text(f"{entry['start']}–{entry['start'] + entry['n'] - 1}")
    expect(page.locator("#timeline-words")).to_contain_text("request-3, which is chosen:")
    expect(page.locator("#timeline-words")).to_contain_text("prefill")
    expect(page.locator("#tables")).to_contain_text("computed)")
    since = page.evaluate("((page.run.steps[14].plan.t[0] - page.run.steps[0].plan.t[0]) * 1e3).toFixed(1)")
    expect(page.locator("#time-words")).to_contain_text(f"scheduler from {since}")
    for canvas in page.locator("canvas").all():
        assert canvas.get_attribute("aria-label")
    assert page.locator("#budget").get_attribute("aria-label").startswith(f"{sum_tokens(page, 14)} of 24 tokens")


def sum_tokens(page, index: int) -> int:
    return page.evaluate(f"page.run.steps[{index}].entries.reduce((sum, e) => sum + e.n, 0)")


def test_drafts_are_struck_out_or_kept(open_page, swapping) -> None:
    page = open_page(swapping[1])
    found = page.evaluate("""() => {
        for (const step of page.run.steps) for (const e of step.entries)
            if (e.sampled.length > 1 && e.kept === e.sampled.length && e.spec >= e.sampled.length)
                return [step.index, e.k, e.sampled.length - 1, e.spec];
    }""")
    index, k, accepted, drafts = found
    page.evaluate(f"page.go({index}); page.choose({k})")
    settle(page)
    expect(page.locator("#chosen ins.accepted")).to_have_count(accepted)
    expect(page.locator("#chosen ins:not(.accepted)")).to_have_count(1)
    expect(page.locator("#chosen del")).to_have_count(drafts - accepted)


def test_the_text_at_the_end_is_the_output(open_page, tmp_path) -> None:
    file, engine, texts = tmp_path / "run.jsonl", tiny_engine(), {}
    with file.open("w", encoding="utf-8") as lines, recording(engine, lines):
        ask(engine)
        while engine.has_unfinished_requests:
            texts |= {output.request_id: output.text for output in engine.step()}
    page = open_page(file)
    shown = page.evaluate("page.run.requests.map((r) => [r.id, page.run.textBefore(r.number, Infinity)])")
    assert dict(shown) == texts


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
def test_nothing_overflows(open_page, swapping, size, scheme) -> None:
    page = open_page(swapping[1], swapping[1], size, scheme)
    page.evaluate("page.go(20)")
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 27)")


def test_a_failed_check_is_replayed_call_by_call(open_page, tmp_path) -> None:
    sched = planted("5.9", tmp_path, "return max((request", "return min((request")
    _, sentence, runs = watch(*sched)
    files = [tmp_path / "mine.jsonl", tmp_path / "reference.jsonl"]
    for file, recorder in zip(files, runs):
        file.write_text(recorder.file.getvalue(), encoding="utf-8")
    page = open_page(*files, what="call")
    page.keyboard.press("d")
    settle(page)
    number = next(i for i, (own, other) in enumerate(zip(runs[0].calls, runs[1].calls), 1) if own != other)
    expect(page.locator("#where")).to_have_text(f"call {number} of {len(runs[1].calls)}")
    expect(page.locator("#events")).to_contain_text("choose_victim()")
    expect(page.locator("#partings")).to_contain_text("This run: returns a. The other: returns c.")
    expect(page.locator("#about")).to_contain_text(f"The check says: {sentence}")
    expect(page.locator("#lanes")).to_be_hidden()


def test_a_step_says_who_waits_who_could_be_preempted_and_who_comes_back(open_page, swapping) -> None:
    page = open_page(swapping[1])
    page.keyboard.press("p")
    settle(page)
    number, *_, candidates = page.evaluate("page.run.steps[page.index].plan.preempt[0]")
    victim = page.evaluate(f"page.run.requests[{number}].id")
    events = page.locator("#events")
    expect(events).to_contain_text(
        "Of those not yet in the step, in the order of the policy fcfs, the last one is taken:"
    )
    expect(events).to_contain_text(f"{victim} (arrival ")
    assert len(candidates) > 1
    expect(page.locator("#waiting")).to_contain_text(f"{victim} (on the host)")
    for admitted, words in (("host", "come back from the host"), ("again", "were found in the prefix cache")):
        find = "(how) => page.run.steps.findIndex((step) => step.entries.some(({ admitted }) => admitted === how))"
        index = page.evaluate(find, admitted)
        if index >= 0:
            page.evaluate(f"page.go({index})")
            settle(page)
            expect(events).to_contain_text("is admitted again: ")
            expect(events).to_contain_text(words)
            expect(page.locator("#entries")).to_contain_text("admitted again: ")
    assert page.evaluate("page.run.miscounted") is None


def test_a_longer_run_beside_this_one_is_counted_in_the_title(open_page, swapping, tmp_path) -> None:
    lines = swapping[1].read_text(encoding="utf-8").splitlines()
    part = tmp_path / "part.jsonl"
    part.write_text("\n".join(lines[:21]), encoding="utf-8")
    page = open_page(part, swapping[1])
    assert page.evaluate("page.same({ requests: [{ id: 'a' }] }, { requests: [{ id: 'b' }, { id: 'a' }] }, 0)") == 1
    own, other = page.evaluate("[page.run.steps.length, page.other.steps.length]")
    expect(page.locator("#title")).to_contain_text(f"{own} steps; the other run has {other}")
    page.keyboard.press("End")
    expect(page.locator("#where")).to_have_text(f"step {other} of {other}: this run has ended")


def test_a_reference_count_that_is_too_high_is_marked(open_page, tmp_path) -> None:
    def forget(engine) -> None:
        free_blocks, skipped = engine.manager.pool.free_blocks, []

        def forgetting(blocks) -> None:
            blocks = list(blocks)
            if not skipped and any(block.ref_cnt > 1 for block in blocks):
                skipped.append(next(block for block in blocks if block.ref_cnt > 1))
                blocks.remove(skipped[0])
            free_blocks(blocks)

        engine.manager.pool.free_blocks = forgetting

    file = tmp_path / "run.jsonl"
    record(file, forget, num_blocks=60)
    page = open_page(file)
    expect(page.locator("#about")).to_contain_text("the reference count of a block is not the number of block tables")
    page.locator("#about button").click()
    settle(page)
    expect(page.locator("#pool-words")).to_contain_text("Miscounted, in more or fewer block tables than")
    block = page.evaluate("page.pool.kinds.findIndex((kind) => kind === 5)")
    page.evaluate(f"page.pool.block = {block}; page.show()")
    settle(page)
    expect(page.locator("#block")).to_contain_text(f"Block {block}: miscounted: ")


def test_two_equal_runs_do_not_part(open_page, swapping) -> None:
    page = open_page(swapping[1], swapping[1])
    expect(page.locator("#partings")).to_contain_text("the same in every step")


# --- three mistakes of a scheduler, planted in a student's engine ---------------------------------------------------


def starve(engine) -> None:
    """A policy that sorts one request last, for ever: 5.4's tuple with a sign wrong for one tenant."""
    policy = engine.scheduler.policy
    engine.scheduler.policy = lambda request, served: (request.request_id == "request-7", *policy(request, served))


def leak(engine) -> None:
    """`free` that forgets the last block of the first table it gets."""
    manager, free, leaked = engine.manager, engine.manager.free, []

    def leaking(request) -> None:
        if not leaked and len(manager.block_tables.get(request.request_id, [])) > 1:
            leaked.append(manager.block_tables[request.request_id].pop())
        free(request)

    manager.free = leaking


def take_the_first(engine) -> None:
    """`choose_victim` with `min` in place of `max`."""
    scheduler = engine.scheduler
    scheduler.choose_victim = lambda: min(
        (request for request in scheduler.running if not request.in_flight), key=scheduler.rank, default=None
    )


@pytest.mark.parametrize("spoil", [starve, leak, take_the_first])
def test_the_difference_shows_a_planted_mistake(open_page, tmp_path, spoil) -> None:
    right, wrong = tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"
    num_blocks = 24 if spoil is take_the_first else 40  # few enough that a victim must be chosen
    record(right, num_blocks=num_blocks)
    record(wrong, spoil, num_blocks=num_blocks)
    page = open_page(wrong, right)
    partings = page.evaluate("page.partings")
    page.keyboard.press("d")
    settle(page)
    assert page.evaluate("page.index") == partings[0]["index"]
    first, rows = partings[0], page.evaluate("byRequest(page.run, page.other)")
    if spoil is starve:
        assert first["aspect"] == "schedule" and any("request-7 " in each for each in first["there"])
        assert rows[0]["id"] == "request-7" and rows[0]["here"]["waited"] > rows[0]["there"]["waited"]
    elif spoil is leak:
        assert first["aspect"] == "blocks"
        page.keyboard.press("ArrowRight")
        expect(page.locator("#pool-words")).to_contain_text("1 block lost: not free, and in no block table: ")
    else:
        assert any("preempted for" in each for each in first["here"])
        victims = [[each for each in side if "preempted for" in each] for side in (first["here"], first["there"])]
        assert victims[0] != victims[1] and victims[1]
