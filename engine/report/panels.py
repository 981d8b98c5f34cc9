"""What a report draws: panels of metrics, and their lines, thinned."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.report.run_log import RunLog

Points = list[tuple[float, float]]  # examples and values

MAX_POINTS = 1000  # of a line: the least and the largest value of each bucket
MEAN_POINTS = 60  # of the smoothed line of a noisy one
FEWEST_TO_SMOOTH = 120


@dataclass(frozen=True)
class Metric:
    """A metric of a panel.

    Args:
        name: in metrics.jsonl.
        label: in the legend.
    """

    name: str
    label: str


@dataclass(frozen=True)
class Panel:
    """A chart of metrics against examples.

    Args:
        key: of its file.
        title: with the unit.
        metrics: of the same unit.
    """

    key: str
    title: str
    metrics: tuple[Metric, ...]


def both(pattern: str) -> tuple[Metric, ...]:
    """The metric of training and of evaluations, by a pattern with {}."""
    return tuple(Metric(pattern.format(split), split) for split in ("train", "eval"))


def roles(prefix: str, *names: str) -> tuple[Metric, ...]:
    """Metrics of evaluations by role."""
    return tuple(Metric(f"{prefix}_eval/{name}", name.replace("_", " ")) for name in names)


PANELS = (
    Panel("loss", "Loss", both("loss/{}")),
    Panel("bits_per_byte", "Bits per byte of text, held out", (Metric("bits_per_byte/eval", "eval"),)),
    Panel("accuracy", "Accuracy: chosen above rejected", both("rewards_{}/accuracies")),
    Panel("margin", "Margin: chosen minus rejected reward", both("rewards_{}/margins")),
    Panel("logratios", "log(policy / reference) in nats, held out", roles("logratios", "chosen", "rejected")),
    Panel("logps", "Log-prob of responses in nats, held out", roles("logps", "chosen", "rejected", "response")),
    Panel("rewards", "Rewards, held out", roles("rewards", "chosen", "rejected", "desirable", "undesirable", "mean")),
    Panel("sampled_rewards", "Reward of responses, held out", roles("rewards", "sampled", "greedy")),
    Panel("objective", "Reward of sampled responses", (Metric("objective/scores", "train"),)),
    Panel(
        "ground_truth",
        "True reward of samples",
        (Metric("ground_truth/policy", "policy"), Metric("ground_truth/reference", "reference")),
    ),
    Panel(
        "win_rate",
        "Win rate over the reference",
        (Metric("win_rate_eval", "all pairs"), Metric("win_rate_eval/length_controlled", "at equal lengths")),
    ),
    Panel(
        "kl",
        "KL in nats per response",
        (
            Metric("kl_eval", "policy to reference"),
            Metric("forward_kl_eval", "reference to policy"),
            Metric("objective/kl", "in training"),
        ),
    ),
    Panel("calibration", "Calibration error, held out", (Metric("calibration_error/eval", "eval"),)),
    Panel(
        "length",
        "Length of samples in tokens",
        (Metric("samples_eval/length", "held out"), Metric("rollout/length_mean", "training")),
    ),
    Panel(
        "unfinished",
        "Share of samples without an end",
        (Metric("samples_eval/unfinished", "held out"), Metric("rollout/truncated", "training")),
    ),
    Panel("equal_groups", "Share of groups with equal rewards", (Metric("rollout/zero_std_groups", "training"),)),
    Panel("entropy", "Entropy of sampled responses in nats", (Metric("objective/entropy", "training"),)),
    Panel(
        "clipped",
        "Share outside of the clip",
        (Metric("policy/clipfrac", "ratios of policies"), Metric("val/clipfrac", "values")),
    ),
    Panel("value_loss", "Loss of the critic", (Metric("loss/value", "train"),)),
    Panel("ratio", "Largest ratio of policies", (Metric("policy/ratio_max", "training"),)),
    Panel("value", "Value: explained variance", (Metric("val/explained_variance", "training"),)),
    Panel("grad_norm", "Gradient norm before clipping", (Metric("grad_norm", "train"),)),
    Panel("learning_rate", "Learning rate", (Metric("learning_rate", "train"),)),
    Panel("throughput", "Tokens per second", (Metric("tokens_per_second", "train"),)),
    Panel("memory", "Peak memory in GB", (Metric("peak_memory_gb", "train"),)),
)


def panels_of(runs: Sequence[RunLog]) -> list[Panel]:
    """The panels with values in a run, without metrics that no run has."""
    found = []
    for panel in PANELS:
        metrics = tuple(
            metric for metric in panel.metrics if any(metric.name in row for run in runs for row in run.rows)
        )
        if metrics:
            found.append(Panel(panel.key, panel.title, metrics))
    return found


def thin(points: Points) -> Points:
    """Points of a line: the least and the largest of each bucket of neighbours, and the ends."""
    if len(points) <= MAX_POINTS:
        return points
    num_buckets = MAX_POINTS // 2 - 1
    inner, kept = points[1:-1], [points[0]]
    for number in range(num_buckets):
        bucket = inner[len(inner) * number // num_buckets : len(inner) * (number + 1) // num_buckets]
        low, high = (choose(bucket, key=lambda point: point[1]) for choose in (min, max))
        kept += sorted({low, high})
    return [*kept, points[-1]]


def smooth(points: Points) -> Points | None:
    """Means of MEAN_POINTS windows of neighbours, at their middle; None for a line short enough to read."""
    if len(points) < FEWEST_TO_SMOOTH:
        return None
    found = []
    for number in range(MEAN_POINTS):
        window = points[len(points) * number // MEAN_POINTS : len(points) * (number + 1) // MEAN_POINTS]
        found.append((sum(x for x, _ in window) / len(window), sum(y for _, y in window) / len(window)))
    return found
