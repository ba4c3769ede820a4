"""Bad configurations end with exit status 2 and a plain message before Ray or another process is started."""

import json
import shutil

import pytest
import yaml
from tiny import preferences, write_preferences

import raydpo
from raydpo.cli.entry import main
from raydpo.config import load_config, train
from raydpo.errors import ConfigError

FUNCTIONS = {
    "score": raydpo.score,
    "train": raydpo.train,
    "run": raydpo.run,
    "audit": raydpo.audit,
    "sweep": raydpo.sweep,
    "eval": raydpo.evaluate,
}
SWEEP = ["sweep={grid: {train.lr: [1.0e-3, 1.0e-4]}}"]


BROKEN = {
    "nan": "model.safetensors", "zeros": "model.safetensors", "small": "model.safetensors", "pointer": "tokenizer.json",
    "generation": "generation_config.json",
}  # fmt: skip
"""File that ``_broken`` breaks, by the name of the fault."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """A configuration that is right, with a finished run of another name to evaluate."""
    place = tmp_path_factory.mktemp("checks")
    write_preferences(place / "a.jsonl", preferences(12))
    shutil.copytree(tiny_llama, place / "bare", ignore=shutil.ignore_patterns("*token*"))
    (place / "bad_functions.py").write_text(
        "def not_a_number(prompt, answer): ...\nvalue = 3\ndef scalar(logps, config, beta): return logps.chosen.mean()\n"
    )
    for name, file in BROKEN.items():
        _broken(shutil.copytree(tiny_llama, place / name), name, place / name / file)
    for name, left_out in (("no_template", ("chat_template",)), ("no_eos", ("eos_token",))):
        _without(shutil.copytree(tiny_llama, place / name), left_out)
    asked, said = [{"role": "user", "content": "Hello?"}], {"role": "assistant"}
    _write(place / "chat.jsonl", lambda n: (asked, [said | {"content": f"a {n}"}], [said | {"content": f"b {n}"}]))
    _write(place / "no_prompt.jsonl", lambda n: ("", f"a {n}", f"b {n}"))
    labelled = [{"prompt": f"a {n} ", "completion": f"b {n}", "label": n % 2 > 0} for n in range(5)]
    (place / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in labelled))
    (place / "empty.jsonl").write_text("")
    (place / "nothing").mkdir()
    (place / "broken.parquet").write_text("no parquet")
    tree = {
        "output": str(place / "runs"),
        "name": "checked",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.3}},
        "evaluate": {"policy": str(tiny_llama)},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


def _write(path, pair):
    records = [dict(zip(("prompt", "chosen", "rejected"), pair(number), strict=True)) for number in range(12)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _without(model, settings):
    """Take settings out of the tokenizer of a model directory."""
    (model / "chat_template.jinja").unlink(missing_ok=True)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key not in settings}))


def _broken(model, how, file):
    """Break one file of a model directory."""
    from safetensors.torch import load_file, save_file

    if how == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 17\n")
        return
    if how == "generation":
        file.write_text('{"temperature": 0.7')
        return
    tensors, config = load_file(file), json.loads((model / "config.json").read_text())
    if how == "zeros":
        tensors = {name: value * 0 for name, value in tensors.items()}
    elif how == "nan":
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    else:  # fewer rows than the tokenizer has tokens
        tensors |= {name: tensors[name][:20].clone() for name in ("lm_head.weight", "model.embed_tokens.weight")}
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def no_ray(monkeypatch):
    import ray

    def refuse(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


ALL = ("score", "train", "run", "audit", "eval", "sweep")
TRAINING = ("train", "run", "sweep")
BAD = [
    (ALL, "train.loss=missing:loss", "'train.loss' is 'missing:loss', but missing cannot be imported"),
    (ALL, "train.loss=bad_functions:value", "has no function 'value'"),
    (ALL, "train.loss=bad_functions:scalar", "bad_functions:scalar"),
    (ALL, "model.path=/nowhere/model", "'model.path' is '/nowhere/model', but there is no such directory"),
    (ALL, "model.path={place}/empty", "model.safetensors"),
    (ALL, "reference.path={place}/empty", "model.safetensors"),
    (ALL, "model.tokenizer={place}/bare", "cannot load a tokenizer"),
    (ALL, "model.path={place}/nan", "model.layers.1.mlp.up_proj.weight holds NaN"),
    (("score", "train"), "reference.path={place}/nan", "model.layers.1.mlp.up_proj.weight holds NaN"),
    (("eval",), "evaluate.policy={place}/nan", "model.layers.1.mlp.up_proj.weight holds NaN"),
    (("score", "train"), "model.path={place}/zeros", "model.safetensors holds zeros in place of weights: all its matrices"),
    (("eval",), "evaluate.policy={place}/zeros", "model.safetensors holds zeros in place of weights"),
    (("score", "train"), "reference.path={place}/generation", "generation/generation_config.json: "),
    (ALL, "model.path={place}/pointer", "tokenizer.json is a Git LFS pointer"),
    (("score", "train", "run", "sweep"), "model.path={place}/small", "small has 20 rows (ids 0 to 19)"),
    (("eval",), "model.path={place}/small; evaluate.policy={place}/small", "small has 20 rows (ids 0 to 19)"),
    (ALL, "model.path={place}/no_template; data.train={place}/chat.jsonl", "the tokenizer has no chat template; set data.c"),
    (ALL, "model.path={place}/no_eos", "the tokenizer has no EOS token, so the end of a text completion cannot be learned"),
    (ALL, "data.train={place}/no_prompt.jsonl", "12 of 12 records are malformed"),
    (ALL, "data.train={place}/b.jsonl", "but there is no such file"),
    (ALL, "data.eval.path={place}/b.jsonl; data.eval.fraction=null", "'data.eval.path'"),
    (
        TRAINING,
        "data.train={place}/labels.jsonl",
        "sigmoid needs pairs, but 5 rows of labels (among its first 1,000 records)",
    ),
    (
        TRAINING,
        "train.router_aux_loss_coef=0.01",
        "not a mixture of experts that returns router logits; set it to 0 or null",
    ),
    (TRAINING, "data.train={place}/labels.jsonl; data.filter=prompt_tokens>0", "needs pairs, but 5 rows of labels hold one"),
    (
        ("train", "run"),
        "data.train={place}/labels.jsonl; train.loss=[{kto: 1.0}, {hinge: 1.0}]",
        "train.loss hinge needs pairs",
    ),
    (
        ("score", *TRAINING, "audit"),
        "data.train={place}/labels.jsonl; train.loss=plackett_luce; data.ranked=lists",
        "hold one completion with a label; set data.ranked to pairs and train.loss to one that takes it (",
    ),
    (("score", *TRAINING, "audit"), "data.train={place}/empty.jsonl", "holds no records"),
    (("score", *TRAINING, "audit"), "data.train={place}/nothing", "holds no .jsonl"),
    (("run", "eval"), "data.eval={path: '{place}/config.yaml'}", "has an unknown suffix"),
    (("eval",), "evaluate.data={place}/broken.parquet", "cannot read broken.parquet"),
    (ALL, "data.chat_template='{% if %}'", "is not valid Jinja"),
    (ALL, "data.filter=chosen_token<3", "did you mean 'chosen_tokens'"),
    (ALL, "data.eval.path=", "override 'data.eval.path=' has no value"),
    (ALL, "cache.uri=$UNSET/cache", "'cache.uri': '$UNSET/cache' contains the variable $UNSET"),
    (ALL, "train.merge_adapter=true", "error: train.merge_adapter has no effect"),
    (("score", *TRAINING, "audit"), "train.loss=simpo; reference.path={place}/bare", "compares with a reference"),
    (("train", "run"), "sweep={grid: {train.lr: [1.0e-3]}}", "section 'sweep' has no effect"),
    (("sweep",), "sweep=null", "nothing to sweep over"),
    (("sweep",), "sweep={grid: {train.lr: [1.0e-3, fast]}}", "trial train.lr=fast: 'train.lr' is 'fast'"),
    (("sweep",), "sweep={grid: {train.loss: [sigmoid, 'missing:loss']}}", "missing cannot be imported"),
    (("sweep",), "sweep.evaluate=true; evaluate.policy=null; evaluate.score_with=missing:judge", "evaluate.score_with"),
    (("eval",), "evaluate.score_with=missing:judge", "evaluate.score_with is 'missing:judge'"),
    (("eval",), "evaluate.score_with=bad_functions:value", "which is not a function"),
    (("eval",), "evaluate.judge={url: 'http://localhost:1/v1', model: m, key: NO_SUCH_KEY}", "NO_SUCH_KEY"),
    (("eval",), "evaluate.reward_model={place}/bare", "they seem to be a causal language model; a reward model is"),
    (("eval",), "evaluate.engine=vllm; evaluate.vllm_python=/nowhere/python", "on this machine /nowhere/python cannot be"),
    (
        ("sweep",),
        "sweep.evaluate=true; evaluate.policy=null; evaluate.engine=vllm; evaluate.vllm_python=/nowhere/python",
        "on this machine /nowhere/python cannot be started",
    ),
    (
        ("sweep",),
        "sweep.evaluate=true; evaluate.policy=null; evaluate.engine=vllm; model.lora.dora=true",
        "vllm does not load an adapter with use_dora True",
    ),
    (("eval",), "evaluate.max_tokens=2048", "more than the 2048 positions of"),
    (("eval",), "data.eval=null", "no pairs to evaluate on"),
    (("eval",), "evaluate.policy=null", "there is no trained policy"),
    (("eval",), "evaluate.policy={place}/empty", "model.safetensors"),
    (("eval",), "evaluate.policy={place}/adapter", "set evaluate.base"),
]


@pytest.mark.parametrize(
    ("verb", "settings", "said"), [(verb, settings, said) for verbs, settings, said in BAD for verb in verbs]
)
def test_bad_input_is_refused_before_ray(verb, settings, said, place, no_ray, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    (place / "empty" / "config.json").write_text("{}")
    (place / "adapter").mkdir(exist_ok=True)
    (place / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/base"}))
    words = [*(SWEEP if verb == "sweep" else []), *settings.replace("{place}", str(place)).split("; ")]
    assert main([verb, str(place / "config.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error, error
    assert "configuration':" not in error
    assert not (place / "runs" / "checked" / "run.json").exists()


@pytest.mark.parametrize("loss, wrong", [("kto", False), ("[{bco: 1.0}, {sft: 0.1}]", False), ("sigmoid", True)])
def test_completions_with_labels_are_scored_whatever_the_loss(loss, wrong, place, no_ray, monkeypatch, capfd):
    monkeypatch.chdir(place)
    words = [str(place / "config.yaml"), f"data.train={place}/labels.jsonl", f"train.loss={loss}"]
    assert main(["score", *words]) == 1  # got as far as Ray
    told = (
        "warning: train.loss sigmoid needs pairs, but 5 rows of labels (among its first 1,000 records) hold one completion"
    )
    output = capfd.readouterr()
    assert (told in output.out + output.err) == wrong
    if not wrong:
        assert main(["train", *words]) == 1


@pytest.mark.parametrize("verb", TRAINING)
def test_more_numbers_than_the_optimizer_counts_are_refused_before_ray(verb, place, no_ray, monkeypatch, capsys):
    monkeypatch.setattr(train, "COUNTED", 50_000)
    words = [*(SWEEP if verb == "sweep" else []), "train.optimizer=adamw_8bit"]
    assert main([verb, str(place / "config.yaml"), *words]) == 2
    assert "cannot count more than 50,000. Set train.zero to 0 or 3, train.workers to 3 or more" in capsys.readouterr().err
    assert main([verb, str(place / "config.yaml"), *words, "model.lora={r: 2}"]) == 1  # got as far as Ray


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model", "/nowhere/model", "--data", "{place}/a.jsonl"],
            "--model is '/nowhere/model', but there is no such directory",
        ),
        (["--model", "{place}/empty", "--data", "{place}/a.jsonl"], "model.safetensors"),
        (["--model", "random-1b", "--data", "/nowhere/b.jsonl"], "--data is '/nowhere/b.jsonl', but there is no such file"),
        (["--model", "random-1b"], "one of --data FILE and --random"),
    ],
)
def test_the_benchmark_refuses_bad_input_before_it_starts_a_process(words, said, place, no_ray, monkeypatch, capsys):
    from raydpo.benchmark import command, run

    def refuse(*args):
        raise AssertionError("a process was started")

    monkeypatch.setattr(run, "start", refuse)
    (place / "empty").mkdir(exist_ok=True)
    (place / "empty" / "config.json").write_text("{}")
    words = [word.replace("{place}", str(place)) for word in words]
    assert command.main([*words, "--full", "--pairs", "16", "--device", "cpu", "--work", str(place / "work")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_callers_from_python_are_told_the_same(verb, place, no_ray):
    config = load_config(place / "config.yaml", [*(SWEEP if verb == "sweep" else []), "train.loss=missing:loss"])
    with pytest.raises(ConfigError, match="missing cannot be imported"):
        FUNCTIONS[verb](config)


@pytest.mark.parametrize("verb", ["score", "train", "run", "eval", "sweep"])
def test_what_is_right_gets_as_far_as_ray(verb, place, no_ray, capsys):
    """The other tests would also pass if nothing ever got there."""
    more = SWEEP if verb == "sweep" else []
    assert main([verb, str(place / "config.yaml"), *more]) == 1
    assert "unexpected AssertionError: Ray was started" in capsys.readouterr().err
