"""``python -m taps_fast train``: the plain recipe on a folder or file of images and any backbone."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from ..model import TapsModel
from ..nn import TaskContext
from .backbone import backbone, head_of, logits_of
from .data import Images, TrainError, load
from .loop import BEST, CHECKPOINT, CLASSES, LAST, LOG, Recipe, Training
from .pieces import Point, tradeoff

DEFAULT = Recipe()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    parser.description = (
        "Trains TAPS on one task: gated deltas, norms and a head over a frozen backbone. Writes into OUT: "
        f"{CHECKPOINT} (run the same command again after a kill, and it goes on bit for bit), {LOG}, "
        f"{CLASSES} (their names in the order of the outputs), and the task folders {BEST} (the most "
        f"accurate epoch among those with the penalty) and {LAST}."
    )
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="a folder with a folder a class (or with such folders train and val), or a file (.npz, .pt, .safetensors) "
        "with images and labels",
    )
    parser.add_argument(
        "--backbone",
        required=True,
        metavar="SPEC",
        help="torchvision:NAME, timm:NAME, transformers:NAME or module:callable",
    )
    parser.add_argument("--out", required=True, type=Path, help="the folder of the run")
    parser.add_argument("--task", help="its name (that of OUT)")
    parser.add_argument(
        "--test", type=Path, metavar="DATA", help="test images (val or test in DATA, else a part of it)"
    )
    parser.add_argument("--hold-out", type=_share, default=0.2, metavar="P", help="that part (%(default)s)")
    parser.add_argument("--head", metavar="PATH", help="the module that the task replaces (the last Linear)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict for the backbone")
    parser.add_argument("--random", action="store_true", help="do not load the backbone's pretrained weights")
    parser.add_argument("--image-size", type=_positive, default=224, metavar="N", help="pixels a side (%(default)s)")
    for option, kind, help in (
        ("epochs", _positive, "passes over the images"),
        ("batch", _positive, "images a step"),
        ("micro-batches", _positive, "parts that a batch is computed in, to save memory; their gradients are averaged"),
        ("lr", _above_zero, "the highest, of AdamW for weights"),
        (
            "score-lr",
            _above_zero,
            "the first, of SGD for scores (layers / steps: the penalty alone then moves a score by λ/4 in the mean)",
        ),
        ("warmup-epochs", _whole, "epochs without the penalty"),
        ("seed", int, "of the head, the order, the held-out part and the augmentation"),
    ):
        default = getattr(DEFAULT, option.replace("-", "_"))
        shown = "" if default is None else f" ({default})"
        parser.add_argument(f"--{option}", type=kind, default=default, metavar="N", help=help + shown)
    parser.add_argument(
        "--lam",
        type=_at_least_zero,
        nargs="+",
        default=[DEFAULT.lam],
        metavar="λ",
        help=f"of the penalty on scores: more closes more; several: a run each, and a picture of them ({DEFAULT.lam})",
    )
    parser.add_argument(
        "--penalty-by",
        choices=("layer", "size"),
        default=DEFAULT.penalty_by,
        help="what an open gate costs: layer, the same everywhere as in the paper; size, its share of the weights "
        "(%(default)s)",
    )
    parser.add_argument("--threshold", type=_above_zero, default=0.1, metavar="τ", help="of the gates (%(default)s)")
    parser.add_argument("--gate", choices=("ste", "raw"), default="ste", help="raw: the score multiplies (%(default)s)")
    parser.add_argument("--augment", action="store_true", help="random crops and mirror images")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (%(default)s)")
    parser.add_argument("--workers", type=_whole, default=0, metavar="N", help="processes that load (%(default)s)")
    parser.add_argument("--checkpoint-every", type=_whole, default=0, metavar="STEPS", help="besides one an epoch")
    parser.add_argument("--tensorboard", action="store_true", help="also write its logs")


def run(args: argparse.Namespace) -> int:
    """Trains; 0: done, 2: it could not, with the reason on standard error."""
    task = args.task or args.out.name
    try:
        _check_name(task)
        device = _device(args.device)
        images, test = load(args.data, args.image_size, args.test, args.hold_out, args.seed)
        print(f"{task}: {len(images)} training and {len(test)} test images of {len(images.names)} classes", flush=True)
        points = [_train(args, task, lam, images, test, device) for lam in args.lam]
        if len(points) > 1:
            tradeoff(points, args.out / "sweep.png")
            print(f"accuracy against parameters: {args.out / 'sweep.png'}")
    except (TrainError, ImportError, OSError) as error:
        print(f"python -m taps_fast train: error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_name(task: str) -> None:
    try:
        TaskContext("train").add(task)
    except ValueError as error:
        raise TrainError(f"{error} (--task says it, else --out)") from None


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, a PyTorch without it, a machine without it
        reason = str(error).partition("\n")[0]
        raise TrainError(f"train: device must be one that PyTorch has here, got {name!r} ({reason})") from None


def _train(
    args: argparse.Namespace, task: str, lam: float, images: Images, test: Images, device: torch.device
) -> Point:
    out = args.out if len(args.lam) == 1 else args.out / f"lam-{lam:g}"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    base = backbone(args.backbone, pretrained=not args.random, weights=args.weights).to(device)
    head = args.head or head_of(base)
    try:
        model = TapsModel(base, head=head, threshold=args.threshold, gate=args.gate)
        model.add_task(task, classes=len(images.names))
    except ValueError as error:  # a head that is none, a name that cannot be a parameter's
        raise TrainError(f"train: {error}") from error
    if not model.conversion.layers:
        raise TrainError(f"train: the backbone must have layers to adapt besides its head, got none (--head {head})")
    dtypes = (parameter.dtype for parameter in base.parameters() if parameter.is_floating_point())
    images.dtype = test.dtype = next(dtypes, torch.float32)
    _try(model, task, images, device, head)
    options = {name: getattr(args, name) for name in Recipe.__dataclass_fields__ if name != "lam"}
    training = Training(
        model,
        task,
        images,
        test,
        Recipe(lam=lam, **options),
        out,
        device=device,
        workers=args.workers,
        checkpoint_every=args.checkpoint_every,
        tensorboard=args.tensorboard,
    )
    begun = f", from step {training.step}" if training.step else ""
    print(f"{args.backbone}, head {head}, {len(model.conversion.layers)} layers with gates, λ = {lam:g}{begun}")
    point = training.run(lambda line: print(line, flush=True))
    print(f"best: accuracy {point.accuracy:.1%} with {point.parameters:.1%} of the base's parameters, in {out / BEST}")
    return point


def _try(model: TapsModel, task: str, images: Images, device: torch.device, head: str) -> None:
    """One image through the network: what it cannot take is said before it trains."""
    x, classes = images[0][0][None].to(device), len(images.names)
    given = f"(--head {head}, an input {tuple(x.shape)} of {images.source})"
    try:
        with torch.no_grad():
            logits = logits_of(model.eval()(x, tasks=task))
    except TrainError:
        raise
    except Exception as error:  # whatever a network raises
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise TrainError(f"train: the network must run on an image, got {reason} {given}") from error
    if logits.shape != (1, classes):
        raise TrainError(
            f"train: the network must return one logit a class, {(1, classes)}, got {tuple(logits.shape)} {given}"
        )


def _number(text: str, rule: str, fits: bool) -> None:
    if not fits:
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")


def _positive(text: str) -> int:
    _number(text, "a whole number of at least 1", text.isdecimal() and int(text) > 0)
    return int(text)


def _whole(text: str) -> int:
    _number(text, "a whole number of at least 0", text.isdecimal())
    return int(text)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _above_zero(text: str) -> float:
    _number(text, "finite and above 0", 0 < _float(text) < math.inf)
    return float(text)


def _at_least_zero(text: str) -> float:
    _number(text, "finite and at least 0", 0 <= _float(text) < math.inf)
    return float(text)


def _share(text: str) -> float:
    _number(text, "between 0 and 1", 0 < _float(text) < 1)
    return float(text)
