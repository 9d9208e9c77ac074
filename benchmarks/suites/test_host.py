"""What the host does in a training beside the networks: in an update, and when a batch is prepared."""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from timm.optim import param_groups_weight_decay

from denim.nim import (
    Autoencoder,
    Classifier,
    ClassifierConfig,
    FinetuneConfig,
    Objective,
    PretrainConfig,
    engine,
    objectives,
    preset,
)
from denim.nim.augmentation import Augmentation
from denim.nim.data import Batch
from denim.nim.finetuning import FinetuneTask
from denim.nim.prefetch import Inputs
from denim.nim.pretraining import PretrainTask
from denim.nim.ranks import Ranks


def build(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(config)


def images_of(count, size):
    """A batch of random images with ids all over int64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    ids = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return Batch(images, torch.zeros(count, dtype=torch.int64), ids)


class Stopwatch:
    """Processor time of this thread inside functions, by name; other programs do not change it.

    Attributes:
        seconds: inside each function, since `seconds` was cleared.
        began: when the first of them was called.
    """

    def __init__(self):
        self.seconds = {}
        self.began = None

    def around(self, name, function):
        def timed(*arguments, **options):
            begin = time.thread_time()
            self.began = self.began or begin
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - begin

        return timed


class Weights(torch.autograd.Function):
    """A network without arithmetic: it returns its input, and gradients for all of its weights."""

    @staticmethod
    def forward(ctx, patches, *weights):
        ctx.weights = weights
        return patches.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, *(torch.zeros_like(weight) for weight in ctx.weights)


@pytest.mark.parametrize("size", ["micro", "base"])
def test_host_time_of_an_update(benchmark, tmp_path, monkeypatch, size):
    """What `training_step` itself does with its inputs ready, for as many weight tensors as the preset has.

    On a GPU this is what the host does beside networks and optimizer. What the GPU does there is left out: the
    operators of noise and loss, and the norm of the gradients, whose time is also given.
    """
    benchmark.group = "host time of an update"
    count = 64 if benchmark.disabled else 4096
    widths = {"embed_dim": 4, "num_heads": 1, "decoder_embed_dim": 4, "decoder_num_heads": 1}
    model = build(preset(size, img_size=2, patch_size=2, channels=3, **widths))
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    config = PretrainConfig(out=tmp_path, batch_size=count, warmup_epochs=1, precision="fp32", device="cpu")
    task = PretrainTask(model, Objective.published("nim"), 0)
    loader = SimpleNamespace(state=lambda: {"bad": {}})
    state = engine.begin(config, task, param_groups_weight_decay(model, 0.05), loader, Ranks(), 100)
    inputs = Inputs(task.prepare(images_of(count, 2), 0), loader.state())
    asked = []

    def ready():
        while True:
            asked.append(time.thread_time())
            yield inputs

    watch, parts = Stopwatch(), ready()
    for place, name in (
        (torch.Tensor, "backward"),
        (state.optimizer, "step"),
        (objectives, "noise_patchify"),
        (objectives, "patch_loss"),
        (torch.nn.utils, "get_total_norm"),
    ):
        monkeypatch.setattr(place, name, watch.around(name, getattr(place, name)))
    network = watch.around("network", lambda patches, mask: Weights.apply(patches, *learning))
    monkeypatch.setattr(model, "forward", network)
    found = {"host_ms": [], "norm_ms": [], "from_inputs_to_first_launch_ms": []}

    def step():
        watch.seconds, watch.began = {}, None
        begin = time.thread_time()
        engine.training_step(state, parts)
        taken = time.thread_time() - begin - sum(watch.seconds.values())
        times = (taken, watch.seconds["get_total_norm"], watch.began - asked[-1])
        for values, seconds in zip(found.values(), times, strict=True):
            values.append(1e3 * seconds)

    step()
    benchmark.pedantic(step, rounds=1 if benchmark.disabled else 100)
    medians = {name: statistics.median(values) for name, values in found.items()}
    benchmark.extra_info |= {"weight_tensors": len(learning), **medians}


@pytest.mark.parametrize("what", ["pretraining", "fine-tuning"])
def test_preparing_a_batch(benchmark, tmp_path, what):
    """What the thread of `prefetched` does for a batch of 4096. What it does for 16 images as well are calls: only
    there it holds Python's lock, since NumPy and SciPy let it go in loops over many numbers.
    """
    benchmark.group = "preparing a batch"
    config = preset("micro", channels=3)
    if what == "pretraining":
        task = PretrainTask(Autoencoder(config), Objective.published("nim"), 0)
    else:
        settings = FinetuneConfig(out=tmp_path, denoiser=tmp_path)
        augmentation = Augmentation(0, (224, 224), config.mean, config.std, 1000)
        classifier = Classifier(ClassifierConfig.for_encoder(config, 10))
        task = FinetuneTask(classifier, Autoencoder(config), settings, augmentation)
    large, small = (images_of(count, 2) for count in (4096, 16))

    def seconds(batch):
        begin = time.thread_time()
        task.prepare(batch, 1)
        return time.thread_time() - begin

    seconds(small)
    benchmark.pedantic(lambda: task.prepare(large, 1), rounds=1 if benchmark.disabled else 50)
    if not benchmark.disabled:
        for name, batch in (("processor_ms", large), ("processor_ms_of_16", small)):
            benchmark.extra_info[name] = 1e3 * statistics.median(seconds(batch) for _ in range(50))
