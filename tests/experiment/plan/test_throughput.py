from m2mkd.experiment.plan.throughput import measure_throughput


def test_throughput_is_measured_on_this_machine() -> None:
    assert measure_throughput(seconds=0.1) > 1e-4
