# SPDX-License-Identifier: Apache-2.0
"""The command line ``megatron-g2rpo``: parses arguments, launches processes, calls the commands, prints results."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from megatron_g2rpo.recipe import Recipe

if TYPE_CHECKING:
    from megatron_g2rpo.commands.eval.settings import Request

R = TypeVar("R", bound=Recipe)

# Read by OpenMP when torch is loaded. Its default, spinning, made a step on a CPU that something else also used five
# times slower; waiting costs a fifth on an idle one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
convert = typer.Typer(no_args_is_help=True, help="Convert weights from Hugging Face format to Megatron, and back.")
app.add_typer(convert, name="convert")
data = typer.Typer(no_args_is_help=True, help="Import datasets of other formats, check them, show them.")
app.add_typer(data, name="data")

RecipePath = Annotated[Path, typer.Argument(help="Path of the recipe (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of recipe keys, key=value.", show_default=False)]
Nproc = Annotated[int | None, typer.Option("--nproc", min=1, help="Processes on this machine (cluster.gpus_per_node).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the layout; run nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an earlier run directory aside instead of resuming it.")]


@app.command()
def train(
    recipe: RecipePath, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, fresh: Fresh = False
) -> None:
    """Train a policy with G2RPO."""
    _loop("train", recipe, overrides or [], nproc, dry_run, fresh)


@app.command()
def sft(
    recipe: RecipePath, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, fresh: Fresh = False
) -> None:
    """Train a policy on the responses of a dataset (the warm start of G2RPO)."""
    _loop("sft", recipe, overrides or [], nproc, dry_run, fresh)


@app.command()
def logprobs(
    model: Annotated[Path, typer.Option("--model", help="Hugging Face directory.")],
    source: Annotated[Path, typer.Option("--input", help="JSON lines to read: prompt, images, response.")],
    target: Annotated[Path, typer.Option("--output", help="JSON lines to write: token_ids, logprobs, entropies.")],
    overrides: Overrides = None,
    nproc: Nproc = None,
) -> None:
    """Compute log-probabilities and entropies of given responses. Overrides set the layout (keys of policy.*)."""
    _with_errors(lambda: _logprobs(model, source, target, overrides or [], nproc))


@app.command(name="eval")
def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Path of a recipe (YAML), and overrides of its keys, key=value.",
            metavar="[RECIPE] [OVERRIDES]...",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face directory; default: policy.model_name.")] = None,
    data: Annotated[str | None, typer.Option(help="Shards; default: data.validation.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write; default: eval/MODEL-DATA.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples of each task; default: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: greedy. Default: 0; with several samples, policy.generation.val_temperature."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    pass_threshold: Annotated[
        list[str] | None,
        typer.Option(help="Accuracy from which a response is a success (pass@k), NUMBER or TASK=NUMBER; default: 1."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Earlier evaluation to compare with, prompt by prompt.")
    ] = None,
    nproc: Nproc = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier evaluation aside; do not go on.")] = False,
) -> None:
    """Evaluate a model on a dataset: of a recipe, or any with --model and --data. The same command again goes on.

    Accuracy, format, length and pass@k of each task with confidence intervals; every answer in OUT/answers.jsonl.
    """
    given = list(arguments or [])
    recipe = _recipe_of(given)

    def run() -> None:
        from megatron_g2rpo.commands.eval.settings import Request

        request = Request(
            recipe=recipe,
            overrides=tuple(given),
            model=model,
            data=data,
            out=out,
            limit=limit,
            samples=samples,
            temperature=temperature,
            seed=seed,
            pass_thresholds=tuple(pass_threshold or ()),
            compare=compare,
            fresh=fresh,
        )
        _evaluate(request, nproc)

    _with_errors(run)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    card: Annotated[str, typer.Option(help="The GPU: a100-40, a100, h100, h100-nvl, h200 or b200.")] = "h100",
    gpu_memory_gb: Annotated[
        float | None, typer.Option(min=1, help="Memory of one GPU, 10^9 bytes; default: the card's.")
    ] = None,
    mean_tokens: Annotated[
        int | None, typer.Option(help="Mean tokens per sequence; default: the longest allowed.")
    ] = None,
    image_tokens: Annotated[int | None, typer.Option(help="Image tokens per prompt; default: as many as fit.")] = None,
    response_tokens: Annotated[
        int | None, typer.Option(help="Mean tokens of a response; default: all that is no image.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Propose layouts and engines instead, fastest first.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of --sweep; default: the recipe's.")] = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Also run a step of one rank of some stages, on tensors without values."),
    ] = False,
) -> None:
    """Check a layout before any GPU is asked for: memory, traffic, time. Exit code 1 if it does not fit."""

    def run() -> None:
        from megatron_g2rpo.commands import plan

        machines = plan.Machines(
            card=card,
            gpu_memory_gb=gpu_memory_gb,
            mean_tokens=mean_tokens,
            image_tokens=image_tokens,
            response_tokens=response_tokens,
        )
        if sweep:
            fits = plan.run_sweep(recipe, overrides or [], machines, gpus, as_json=as_json)
        else:
            fits = plan.run(recipe, overrides or [], machines, as_json=as_json, rehearse=rehearse)
        if not fits:
            raise typer.Exit(1)

    _with_errors(run)


def _checked_size(text: str) -> str:
    """Return a size as it was given, if it is one."""
    size = re.fullmatch(r"(\d+(\.\d+)?) ?[KMGT]B", text, re.IGNORECASE)
    if size is None or not float(size[1]):
        raise typer.BadParameter(f"{text!r} is no size; write a number above 0 with KB, MB, GB or TB, as in 5GB")
    return text


Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Data type of the result; default: that of the source."),
]


@convert.command("import")
def convert_import(
    source: Annotated[Path, typer.Argument(help="Hugging Face directory.", metavar="HF_DIR", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Megatron checkpoint to write.", metavar="OUT", show_default=False)],
    overrides: Overrides = None,
    nproc: Nproc = None,
    dtype: Dtype = None,
) -> None:
    """Write a Hugging Face directory as a Megatron checkpoint, which runs of any layout can start from."""
    _with_huge_pages()
    _with_errors(lambda: _import(source, target, overrides or [], nproc, dtype))


@convert.command("export")
def convert_export(
    source: Annotated[Path, typer.Argument(help="Megatron checkpoint.", metavar="CKPT", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Hugging Face directory to write.", metavar="OUT", show_default=False)],
    overrides: Overrides = None,
    nproc: Nproc = None,
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of one safetensors file.", callback=_checked_size)
    ] = "5GB",
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory with config and tokenizer.")] = None,
) -> None:
    """Write a Megatron checkpoint, of `convert import` or a run's step_N, as a Hugging Face directory.

    The checkpoint may have been saved at any layout; no model is built. Several processes divide the files of the
    result among themselves. All overrides are checked; only those of the cluster's size and policy.model_name count.
    """
    _with_huge_pages()
    _with_errors(lambda: _export(source, target, overrides or [], nproc, dtype, max_shard_size, model))


@data.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="File or folder to read.", metavar="SOURCE", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Directory for the shards.", metavar="OUT", show_default=False)],
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of the importer, key=value.", show_default=False)
    ] = None,
    importer: Annotated[str, typer.Option(help="Name of the importer; auto: told from the first row.")] = "auto",
    imports: Annotated[list[str] | None, typer.Option(help="Module or .py file with your importer or formats.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of all samples.")] = None,
    task_field: Annotated[str | None, typer.Option(help="Field with the task; dots reach into objects.")] = None,
    answer_format: Annotated[str | None, typer.Option(help="Answer format of all samples.")] = None,
    answer_format_field: Annotated[str | None, typer.Option(help="Field with the answer format.")] = None,
    map_fields: Annotated[
        list[str] | None, typer.Option("--map", metavar="FIELD=PATH", help="Where a sample's field is; repeatable.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hugging Face dataset.")] = None,
    image_dir: Annotated[Path | None, typer.Option(help="What image paths are relative to; default: SOURCE's.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and check images.")] = 1,
    decode: Annotated[bool, typer.Option(help="Decode every image, and reject a damaged one.")] = True,
    split: Annotated[
        float | None, typer.Option(help="Share of a validation part, by image: OUT/train and OUT/val.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first rows only.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 8192,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be imported.")] = False,
) -> None:
    """Write a dataset of another format as shards with an index.

    Exit status: 0, everything was imported; 3, some rows were rejected, and OUT.rejected.jsonl lists them; 1, an error,
    and nothing was written.
    """

    def run() -> None:
        from rich.console import Console

        from megatron_g2rpo.commands import data_import as command
        from megatron_g2rpo.data.importers.write import ImportSettings

        settings = ImportSettings(
            task=task,
            task_field=task_field,
            answer_format=answer_format,
            answer_format_field=answer_format_field,
            image_dir=image_dir,
            workers=workers,
            decode=decode,
            validation_share=split,
            limit=limit,
            samples_per_shard=shard_size,
            strict=strict,
        )
        named = {"map_fields": map_fields or [], "subset": subset}
        result = command.run(source, target, importer, options or [], imports or [], settings, **named)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        for each in command.summary(result, target):
            console.print(each)
        if result.rejected:
            raise typer.Exit(command.SOME_REJECTED)

    _with_errors(run)


Workers = Annotated[int, typer.Option(min=1, help="Processes that look at samples.")]
DataPath = Annotated[Path, typer.Argument(help="Dataset of shards.", metavar="DATA", show_default=False)]
OptionalRecipe = Annotated[
    Path | None,
    typer.Argument(help="Recipe whose limits, tasks and model count.", metavar="[RECIPE]", show_default=False),
]


@data.command("check")
def data_check(
    path: DataPath,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    validation: Annotated[
        Path | None, typer.Option(help="Held-out dataset that must have other images; default: the recipe's.")
    ] = None,
    workers: Workers = 1,
    out: Annotated[Path | None, typer.Option(help="JSON-lines file for all faults.")] = None,
) -> None:
    """Look at every sample: images, references, lengths, repetitions. Exit code 1 if a run could not use them all."""

    def run() -> None:
        from megatron_g2rpo.commands import data_check as command

        if not command.run(path, recipe, overrides or [], validation=validation, workers=workers, out=out):
            raise typer.Exit(1)

    _with_errors(run)


@data.command("show")
def data_show(
    path: DataPath,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Page to write (HTML).")] = Path("samples.html"),
    task: Annotated[str | None, typer.Option(help="Only samples of this task.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of samples of each task.")] = 5,
) -> None:
    """Write a page of samples, with their prompts and pictures as the model gets them."""

    def run() -> None:
        from megatron_g2rpo.commands import data_show as command

        count = command.run(path, recipe, overrides or [], out=out, task=task, limit=limit)
        typer.echo(f"wrote {count} samples to {out}")

    _with_errors(run)


@app.command()
def serve(
    recipe: RecipePath,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Start a vLLM server that gives a run its rollouts (policy.generation.backend=vllm_server)."""
    _with_errors(lambda: _serve(recipe, overrides or [], host, port))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Draw a run's rewards per task, before and after training, and write the picture to RUN/report."""
    from megatron_g2rpo.report.rewards import draw

    _with_errors(lambda: typer.echo(f"wrote {draw(run)}"))


@app.command()
def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Path of a recipe (YAML), and overrides of its keys, key=value.",
            metavar="[RECIPE] [OVERRIDES]...",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    rollout: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="Sample a few responses; compare engine and trainer token by token."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts for --rollout.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Number of responses to each prompt.")] = 1,
    nproc: Nproc = None,
) -> None:
    """Show what this machine has and what a recipe would run on; or check a recipe's rollouts.

    Exit code 1 if something that is needed is missing, or something that is installed is broken.
    """
    given = list(arguments or [])
    if rollout is not None:
        path = rollout
        _with_errors(lambda: _compare(path, given, prompts, samples, nproc))
        return

    def run() -> None:
        from megatron_g2rpo.commands import doctor

        recipe = _recipe_of(given)
        overrides = [*given, *_cluster(nproc)]
        if recipe is None and overrides:
            raise ValueError(f"doctor: {overrides[0]} is an override, and there is no recipe to override")
        if not doctor.run(recipe, overrides, json=as_json):
            raise typer.Exit(1)

    _with_errors(run)


def _loop(
    kind: Literal["train", "sft"], path: Path, overrides: list[str], nproc: int | None, dry_run: bool, fresh: bool
) -> None:
    def run() -> None:
        from megatron_g2rpo import recipe as recipes
        from megatron_g2rpo.commands import launch

        asked = [*overrides, *_cluster(nproc)]
        if launch.is_rank():
            recipe = recipes.load(path, asked, kind)
        else:  # before any process is started
            from megatron_g2rpo.commands.preflight import checked

            recipe = checked(path, asked, kind, download=not dry_run)
        if dry_run:
            typer.echo(recipes.dump(recipe))
            typer.echo(recipes.describe_layout(recipe))
            return
        from megatron_g2rpo.commands import out_of_memory
        from megatron_g2rpo.train.run import directory
        from megatron_g2rpo.train.run.watchdog import watching

        local, on_many = _with_local_model(recipe), _prepare_processes(recipe)
        with ExitStack() as held:
            if _is_first() and launch.is_launched():
                held.enter_context(directory.joined(recipe))
            elif _is_first():
                for note in held.enter_context(directory.claimed(recipe, fresh=fresh)):
                    typer.echo(note)
            if on_many:
                launch.launch(recipe.cluster.gpus_per_node, [kind, str(path), *overrides], stoppable=True)
                return
            entry = _entry(kind)  # what it imports takes seconds, and is not watched
            with watching(recipe, launch.end), out_of_memory.explained(recipe):
                exported = entry(local)
        if exported is not None and _is_first():
            typer.echo(f"Hugging Face checkpoint: {exported}")

    if dry_run:
        _with_errors(run)
        return
    from megatron_g2rpo.train.run import signals

    with signals.watched():  # before torch is imported, which takes seconds
        _with_errors(run)


def _entry(kind: str) -> Callable[..., Path | None]:
    if kind == "train":
        from megatron_g2rpo.train.g2rpo import train as entry

        return entry
    from megatron_g2rpo.train.sft import sft as entry_sft

    return entry_sft


def _logprobs(model: Path, source: Path, target: Path, overrides: list[str], nproc: int | None) -> None:
    recipe = _policy_recipe([f"policy.model_name={model}", "policy.precision=float32", *overrides], nproc)
    if _prepare_processes(recipe):
        from megatron_g2rpo.commands.launch import launch

        arguments = ["logprobs", "--model", str(model), "--input", str(source), "--output", str(target), *overrides]
        launch(recipe.cluster.gpus_per_node, arguments)
        return
    from megatron_g2rpo.commands.logprobs import logprobs as run

    lines = run(recipe, source, target)
    if _is_first():
        typer.echo(f"wrote {lines} lines to {target}")


def _evaluate(request: Request, nproc: int | None) -> None:
    from megatron_g2rpo.commands.eval import run
    from megatron_g2rpo.commands.eval.settings import completed
    from megatron_g2rpo.commands.launch import launch

    settings = completed(request, _cluster(nproc))
    if _prepare_processes(settings.recipe):
        launch(settings.recipe.cluster.gpus_per_node, request.arguments())
        return
    run.evaluate(request, settings)


def _with_huge_pages() -> None:
    """Let torch use huge pages, which speeds up commands that mostly move tensors. Call it before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _import(source: Path, target: Path, overrides: list[str], nproc: int | None, dtype: str | None) -> None:
    from megatron_g2rpo.commands.convert.common import (
        check_target,
        precision_of,
        remove_on_failure,
        warn_without_tokenizer,
    )
    from megatron_g2rpo.commands.launch import is_launched, launch
    from megatron_g2rpo.weights import SafetensorsDirectory

    if not is_launched():
        check_target(target)
        warn_without_tokenizer(source)
    dtype = dtype or precision_of(SafetensorsDirectory(source).dtypes, source)
    recipe = _policy_recipe([f"policy.model_name={source}", f"policy.precision={dtype}", *overrides], nproc)
    if _prepare_processes(recipe):
        arguments = ["convert", "import", str(source), str(target), "--dtype", dtype, *overrides]
        with remove_on_failure(target):
            launch(recipe.cluster.gpus_per_node, arguments)
        return
    from megatron_g2rpo.commands.convert.import_hf import import_hf

    import_hf(recipe, target)
    if _is_first():
        typer.echo(f"Megatron checkpoint: {target}")


def _export(
    source: Path,
    target: Path,
    overrides: list[str],
    nproc: int | None,
    dtype: str | None,
    max_shard_size: str,
    model: Path | None,
) -> None:
    from megatron_g2rpo.commands.convert.common import (
        check_target,
        precision_of,
        remove_on_failure,
        warn_without_tokenizer,
    )
    from megatron_g2rpo.commands.convert.export_hf import export, model_files
    from megatron_g2rpo.commands.launch import is_launched, launch
    from megatron_g2rpo.weights.megatron_checkpoint import MegatronCheckpoint

    if not is_launched():
        check_target(target)
    checkpoint = MegatronCheckpoint(source)
    dtype = dtype or precision_of(checkpoint.dtypes, source)
    recipe = _policy_recipe([f"policy.model_name={model_files(source, model)}", *overrides], nproc)
    directory = Path(recipe.policy.model_name)
    if not is_launched():
        warn_without_tokenizer(directory)
    if _prepare_processes(recipe):
        options = ["--max-shard-size", max_shard_size, "--model", str(directory), "--dtype", dtype]
        with remove_on_failure(target):
            launch(recipe.cluster.gpus_per_node, ["convert", "export", str(source), str(target), *options, *overrides])
        return
    export(checkpoint, target, source=directory, dtype=dtype, max_shard_size=max_shard_size)
    if _is_first():
        typer.echo(f"Hugging Face checkpoint: {target}")


def _compare(path: Path, overrides: list[str], prompts: int, samples: int, nproc: int | None) -> None:
    from megatron_g2rpo import recipe as recipes
    from megatron_g2rpo.commands.launch import launch

    recipe = _with_local_model(recipes.load(path, [*overrides, *_cluster(nproc)], "train"))
    if _prepare_processes(recipe):
        options = [f"--rollout={path}", f"--prompts={prompts}", f"--samples={samples}"]
        launch(recipe.cluster.gpus_per_node, ["doctor", *options, *overrides])
        return
    from megatron_g2rpo.commands.compare_rollouts import compare

    lines = compare(recipe, prompts, samples)
    if _is_first():
        typer.echo("\n".join(lines))


def _serve(path: Path, overrides: list[str], host: str, port: int) -> None:
    from megatron_g2rpo import recipe as recipes
    from megatron_g2rpo.commands.model_dir import with_local_model
    from megatron_g2rpo.rollout.base import needs_vllm

    recipe = with_local_model(recipes.load(path, overrides, "train"))
    with needs_vllm("megatron-g2rpo serve"):
        from megatron_g2rpo.rollout.vllm import serve
    command, environment = serve.command(recipe.policy, host, port)
    os.execve(command[0], command, {**os.environ, **environment})


def _policy_recipe(overrides: list[str], nproc: int | None) -> Recipe:
    """Return a recipe for a command that reads only the sections ``policy`` and ``cluster``."""
    from megatron_g2rpo import recipe as recipes

    # A recipe must have at least one task; these commands use none.
    settings = ["env.tasks={any: {}}", *overrides, *_cluster(nproc)]
    return _with_local_model(recipes.load(recipes.EXEMPLARS / "vlm_sft.yaml", settings, "sft"))


def _with_local_model(recipe: R) -> R:
    """Return the recipe with ``policy.model_name`` as a local directory whose model fits the recipe's layout.

    Raises:
        ValueError: the model cannot be split as the layout asks.
    """
    from megatron_g2rpo.commands.model_dir import with_local_model
    from megatron_g2rpo.policy.layouts.layout import check_model_dir

    local = with_local_model(recipe)
    check_model_dir(local.policy.model_name, local.policy.megatron_cfg)
    return local


def _recipe_of(arguments: list[str]) -> Path | None:
    """Take the recipe from arguments that begin with one, unless they are overrides alone."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return Path(arguments.pop(0))
    return None


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _cluster(nproc: int | None) -> list[str]:
    """Return overrides of the cluster's size: from torchrun's environment if there is one, else from ``--nproc``."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return [f"cluster.gpus_per_node={local}", f"cluster.num_nodes={world // local}"]
    return [] if nproc is None else [f"cluster.gpus_per_node={nproc}", "cluster.num_nodes=1"]


def _prepare_processes(recipe: Recipe) -> bool:
    """Set the recipe's environment variables, and return whether processes must be launched, which then inherit them.

    Call it before the policy is imported: Transformer Engine reads some of the variables as it is loaded.
    """
    from megatron_g2rpo.policy.environment import set_environment

    set_environment(recipe.policy.megatron_cfg.env_vars)
    nodes, processes = recipe.cluster.num_nodes, recipe.cluster.gpus_per_node
    if "RANK" in os.environ:
        return False
    if nodes > 1:
        raise ValueError(
            f"the recipe asks for {nodes} nodes of {processes} processes: start it with `sbatch slurm/train_g2rpo.sh`, "
            "or on this machine alone with --nproc N"
        )
    return processes > 1


def _with_errors(run: Callable[[], None]) -> None:
    """Run a command. An error that the user can fix is printed without its traceback."""
    from megatron_g2rpo.commands import launch

    try:
        run()
    except launch.EXPECTED as error:
        launch.end(error)
    except BaseException as error:
        if not launch.is_rank():
            raise
        launch.end(error)


if __name__ == "__main__":
    app()
