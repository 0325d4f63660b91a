"""Who may run in vLLM now: calls of one phase together, calls of two phases never."""

from threading import Barrier, Event, Thread

from logitlake_teacher.engines.vllm.phases import Phase, PhaseGate

# A thread that should run and does not is a deadlock, not a slow machine.
PATIENCE_SECONDS = 60


def test_calls_of_one_phase_run_together() -> None:
    """Three scoring calls meet inside the gate: none would get past the barrier alone."""
    gate, meeting = PhaseGate(), Barrier(3, timeout=PATIENCE_SECONDS)

    def call() -> None:
        with gate.enter("score"):
            meeting.wait()

    threads = [Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not meeting.broken


def test_phases_never_overlap() -> None:
    """Twelve threads, two phases, a thousand turns: whoever is inside sees its own phase only."""
    gate, inside, mixed = PhaseGate(), [], []

    def call(phase: Phase) -> None:
        for _ in range(100):
            with gate.enter(phase):
                inside.append(phase)
                mixed.extend(other for other in list(inside) if other != phase)
                inside.remove(phase)

    phases: tuple[Phase, ...] = ("score", "sample")
    threads = [Thread(target=call, args=(phases[number % 2],)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    assert mixed == []
    assert inside == []


def test_a_waiting_phase_goes_before_newcomers_of_the_running_one() -> None:
    """Otherwise a stream of scoring calls would keep sampling out for ever."""
    gate, order, scoring, let_go = PhaseGate(), [], Event(), Event()

    def first() -> None:
        with gate.enter("score"):
            scoring.set()
            let_go.wait(PATIENCE_SECONDS)
            order.append("first score")

    def later(phase: Phase, name: str) -> None:
        with gate.enter(phase):
            order.append(name)

    threads = [Thread(target=first)]
    threads[0].start()
    assert scoring.wait(PATIENCE_SECONDS)
    for phase, name in (("sample", "sample"), ("score", "second score")):
        threads.append(Thread(target=later, args=(phase, name)))
        threads[-1].start()
        while len(gate.waiting) < len(threads) - 1:
            pass
    let_go.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert order == ["first score", "sample", "second score"]


def test_a_call_that_fails_lets_the_others_in() -> None:
    """An exception inside the gate is no reason to keep it shut."""
    gate = PhaseGate()
    try:
        with gate.enter("score"):
            raise ValueError
    except ValueError:
        pass
    with gate.enter("sample"):
        pass
