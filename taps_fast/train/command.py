"""``python -m taps_fast train``: the plain recipe on a folder or file of images and any backbone."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .._command import UserError, above_zero, at_least_zero, device, positive, share, whole
from .._names import counted
from ..model import TapsModel
from ..nn import TaskContext
from .backbone import backbone, check_head, head_of, logits_of
from .data import Images, TrainError, load
from .loop import BEST, CHECKPOINT, CLASSES, LAST, LOG, Recipe, Training
from .pieces import Point, tradeoff

DEFAULT = Recipe()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    parser.description = (
        "Trains TAPS on one task: gated deltas, norms and a head over a frozen backbone. Writes into OUT: "
        f"{CHECKPOINT} (run the same command again after a kill, and it goes on bit for bit), {LOG}, {CLASSES} (their "
        f"names in the order of the outputs), and the task folders {BEST} (the most accurate epoch of those with the "
        f"penalty) and {LAST}. Images are squeezed to a square and normalised with ImageNet's mean and standard "
        "deviation; inputs in a file that are not uint8 stay as they are."
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
    parser.add_argument("--task", help="the task's name (the last part of OUT, with _ for each dot)")
    parser.add_argument(
        "--test", type=Path, metavar="DATA", help="test images (val or test in DATA, else --hold-out of its images)"
    )
    parser.add_argument(
        "--hold-out",
        type=share,
        default=0.2,
        metavar="P",
        help="the part of the images that tests and does not train, where there are no test images (%(default)s)",
    )
    parser.add_argument("--head", metavar="PATH", help="the module that the task replaces (the last Linear)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict for the backbone")
    parser.add_argument("--random", action="store_true", help="do not load the backbone's pretrained weights")
    parser.add_argument("--image-size", type=positive, default=224, metavar="N", help="pixels a side (%(default)s)")
    for option, kind, help in (
        ("epochs", positive, "passes over the images"),
        ("batch", positive, "images a step"),
        ("micro-batches", positive, "parts that a batch is computed in, to save memory; their gradients are averaged"),
        ("lr", above_zero, "the highest, of AdamW for weights"),
        (
            "score-lr",
            above_zero,
            "of SGD for scores; it falls once the penalty is there (such that the penalty alone moves a score by λ/4 "
            "in the mean)",
        ),
        ("warmup-epochs", whole, f"epochs without the penalty ({DEFAULT.warmup_epochs}; 0 of a single epoch)"),
        ("seed", int, "of the head, the order, the held-out part and the augmentation"),
    ):
        default = None if option == "warmup-epochs" else getattr(DEFAULT, option.replace("-", "_"))
        shown = "" if default is None else f" ({default})"
        parser.add_argument(f"--{option}", type=kind, default=default, metavar="N", help=help + shown)
    parser.add_argument(
        "--lam",
        type=at_least_zero,
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
    parser.add_argument("--threshold", type=above_zero, default=0.1, metavar="τ", help="of the gates (%(default)s)")
    parser.add_argument("--gate", choices=("ste", "raw"), default="ste", help="raw: the score multiplies (%(default)s)")
    parser.add_argument("--augment", action="store_true", help="random crops and mirror images")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="such as cpu or cuda (%(default)s)")
    parser.add_argument("--workers", type=whole, default=0, metavar="N", help="processes that load (%(default)s)")
    parser.add_argument("--checkpoint-every", type=whole, default=0, metavar="STEPS", help="besides one an epoch")
    parser.add_argument("--tensorboard", action="store_true", help="also write its logs")


def run(args: argparse.Namespace) -> None:
    """Trains.

    Raises:
        UserError: it cannot, and why.
    """
    task = args.task or args.out.name.replace(".", "_")
    try:
        _check_name(task)
        if not args.task and task != args.out.name:
            print(f"{task}: the task's name, which holds no dots as {args.out.name!r} does (--task says another)")
        options = {name: getattr(args, name) for name in Recipe.__dataclass_fields__ if name != "lam"}
        if args.warmup_epochs is None:
            options["warmup_epochs"] = min(DEFAULT.warmup_epochs, args.epochs - 1)
        recipes = [Recipe(lam=lam, **options) for lam in args.lam]
        images, test = load(args.data, args.image_size, args.test, args.hold_out, args.seed)
        print(f"{task}: {len(images)} training and {len(test)} test images of {len(images.names)} classes", flush=True)
        points = [_train(args, task, recipe, images, test) for recipe in recipes]
        if len(points) > 1:
            tradeoff(points, args.out / "sweep.png")
            print(f"accuracy against parameters: {args.out / 'sweep.png'}")
    except (ImportError, OSError) as error:
        raise UserError(f"train: {error}") from error


def _check_name(task: str) -> None:
    try:
        TaskContext("train").add(task)
    except ValueError as error:
        raise TrainError(f"{error} (--task says it, else --out)") from None


def _train(args: argparse.Namespace, task: str, recipe: Recipe, images: Images, test: Images) -> Point:
    out = args.out if len(args.lam) == 1 else args.out / f"lam-{recipe.lam:g}"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    base = backbone(args.backbone, pretrained=not args.random, weights=args.weights).to(args.device)
    head = args.head or head_of(base)
    check_head(base, head)
    try:
        model = TapsModel(base, head=head, threshold=args.threshold, gate=args.gate)
        model.add_task(task, classes=len(images.names))
    except ValueError as error:  # a head that is none, a name that cannot be a parameter's
        raise TrainError(f"train: {error}") from error
    if not model.conversion.layers:
        raise TrainError(f"train: the backbone must have layers to adapt besides its head, got none (--head {head})")
    dtypes = (parameter.dtype for parameter in base.parameters() if parameter.is_floating_point())
    images.dtype = test.dtype = next(dtypes, torch.float32)
    _try(model, task, images, args.device, head)
    training = Training(
        model,
        task,
        images,
        test,
        recipe,
        out,
        device=args.device,
        workers=args.workers,
        checkpoint_every=args.checkpoint_every,
        tensorboard=args.tensorboard,
    )
    begun = f", from step {training.step}" if training.step else ""
    threads = f" ({torch.get_num_threads()} threads)" if args.device.type == "cpu" else ""
    print(
        f"{args.backbone}, head {head}, {counted(len(model.conversion.layers), 'layer')} with gates, "
        f"λ = {recipe.lam:g}, {args.device}{threads}{begun}",
        flush=True,
    )
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
