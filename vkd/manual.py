"""The help page of `python -m vkd.train`, made from the files in `conf/` so that it cannot go stale."""

from __future__ import annotations

import textwrap

from vkd.composition import group_choices

_GROUPS = {
    "dataset": "what is learnt; brings the recipe and the pair that the literature uses with it",
    "pair": "teacher and student at once; or name any timm networks: teacher.arch=... student.arch=...",
    "method": "how the student is taught; a sum is written method=[kd,other]",
    "divergence": "how far the student's distribution is from the teacher's",
    "recipe": "epochs, batch size, optimizer, schedule; recipe@teacher.recipe=... for a teacher that vkd trains",
    "tracker": "who is told beside the run directory",
    "experiment": "named studies, added with a plus: +experiment=...",
    "hydra/launcher": "fused: students of a sweep side by side; ray, slurm: its jobs on a cluster; fused_...: both",
}

_EXAMPLES = [
    ("a full run on embedded data: a teacher is trained once, then a student", "python -m vkd.train"),
    (
        "the paper's pair on CIFAR-100, with a checkpoint for the teacher",
        "python -m vkd.train dataset=cifar100 pair=resnet56_resnet20 teacher.checkpoint=resnet56.safetensors \\\n"
        "    divergence=abkd divergence.alpha=0.8 divergence.beta=0.3",
    ),
    (
        "a sweep: 2 x 3 x 3 students",
        "python -m vkd.train -m divergence=abkd divergence.alpha=0.6,0.8 divergence.beta=0.0,0.2,0.4 seed=1,2,3",
    ),
    (
        "the same sweep for little more than one teacher and 18 students: side by side, six at a time",
        "python -m vkd.train -m hydra/launcher=fused \\\n"
        "    divergence=abkd divergence.alpha=0.6,0.8 divergence.beta=0.0,0.2,0.4 seed=1,2,3",
    ),
    (
        "your own photos, with networks from timm",
        "python -m vkd.train dataset=imagefolder dataset.root=photos teacher.arch=convnext_tiny \\\n"
        "    student.arch=mobilenetv3_small_100",
    ),
    (
        "a method of the literature with its published weights, on CIFAR-100",
        "python -m vkd.train +experiment=cifar100/dkd teacher.checkpoint=resnet56.safetensors",
    ),
    (
        "a named study, how it stands meanwhile, and its table",
        "python -m vkd.train +experiment=quickstart\npython -m vkd.sweep watch=true\n"
        "python -m vkd.collect study=quickstart",
    ),
    (
        "a run of somebody else once more, from its directory or its config.yaml, and with other seeds",
        "python -m vkd.train from=theirs/kd-abkd-s1-0a1b2c3d runs_root=repeated\n"
        "python -m vkd.train -m from=theirs/kd-abkd-s1-0a1b2c3d/config.yaml seed=1,2,3",
    ),
]

_KEYS = [
    ("seed=1", "decides weights, order, augmentation, dropout: the same seed twice gives the same numbers"),
    ("study=null", "folder of the run below runs_root; null: the data set's name"),
    ("device=auto", "cuda, mps or cpu, whichever is there first; or cuda:1, cpu, ..."),
    ("precision=fp32", "fp32, bf16 or fp16"),
    ("deterministic=false", "true: the same bits each time, also on CUDA; slower, and what cannot be is named"),
    ("teacher.checkpoint=null", "weights of the teacher, .safetensors or .pth; null: vkd trains it, once"),
    ("teacher.pretrained=false", "timm's pretrained weights"),
    ("divergence.temperature=4.0", "softens both distributions"),
    ("cross_entropy_weight=null", "of the labels; null: the literature's beside the method, 0.1 for kd"),
    ("recipe.epochs=...", "and recipe.batch_size, .optimizer, .learning_rate, .scheduler, .clip_grad_norm, .ema_decay"),
    ("dataset.val_fraction=0.1", "carved from train for selection; 0: no selection, all of train"),
    ("dataset.train_fraction=1", "share of the training images to learn from, per class"),
    ("runs_root=runs", "and data_root=data; results_root=results is for vkd.collect"),
    ("teacher.cache=none", "views: keep its logits for every view that crop and flip can make, for all runs to come"),
    (
        "compile, channels_last, ...",
        "fused_optimizer, graphs, keep_freed_memory, teacher.fold, teacher.compile: speed alone",
    ),
    ("checkpoint_minutes=10", "between checkpoints within an epoch; there is one at its end anyway"),
    (
        "snapshot_every=null",
        "epochs between copies of the student for vkd.analyze to look at; null: the last one alone",
    ),
    ("tracker.log_student=false", "true: the finished student as an artifact of W&B"),
    ("sync_batch_norm=true", "over the processes that torchrun starts; false: each of them has statistics of its own"),
    ("students_at_once=null", "of the fused launcher; null: as many as memory holds"),
]


def train_page() -> str:
    """The page as text, 100 columns."""
    choices = group_choices()
    lines = [
        "vkd.train: knowledge distillation for vision, with forward KL, reverse KL and all between them.",
        "",
        "    python -m vkd.train [-m] [from=RUN] [group=choice ...] [key=value ...]",
        "",
        "One command is one run; with -m, comma-separated values make a sweep. A run that was stopped goes on",
        "with the same command, one that is done is not done again. from= takes everything from the config of a",
        "run, by its directory or its config.yaml, but for what the other words say.",
        "",
        "GROUPS AND THEIR CHOICES",
    ]
    known = [*_GROUPS, *sorted(set(choices) - set(_GROUPS))]
    for group in known:
        if group in choices:
            lines.append(f"  {group}: {_GROUPS.get(group, '')}".rstrip(": "))
            lines += textwrap.wrap(", ".join(choices[group]), 96, initial_indent="      ", subsequent_indent="      ")
    lines += ["", "KEYS (with their defaults; every key and its type: vkd/config.py)"]
    lines += [f"  {key:<28}{meaning}" for key, meaning in _KEYS]
    lines += ["", "EXAMPLES"]
    for meaning, command in _EXAMPLES:
        lines += [f"  {meaning}", textwrap.indent(command, "      ")]
    lines += [
        "",
        "HYDRA'S OWN SWITCHES",
        "  --cfg job    print the composed config and stop      --info defaults    where each part comes from",
        "",
        "A run leaves config.yaml, metrics.jsonl, result.json, student.safetensors, last.ckpt, status.json and",
        "train.log in runs/<study>/<teacher>-<student>/<method>-<divergence>-s<seed>-<hash>/.",
        "See also: --help of python -m vkd.sweep, vkd.collect, vkd.analyze, vkd.evaluate, vkd.export, vkd.dashboard,",
        "vkd.benchmark.",
    ]
    return "\n".join(lines)
