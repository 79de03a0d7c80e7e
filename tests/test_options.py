"""Options kept in a file, and what the types of options accept."""

import tomllib
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.cli import cli
from autocompress.learning.training import Optimizer
from autocompress.recovery import RECOVERIES
from autocompress.searching.samplers import SAMPLERS
from autocompress.terminal.options import options_of, write_config
from autocompress.terminal.shared_options import check_shared

TUNE = cli.commands["tune"]


def parse(*argv: str) -> click.Context:
    """What ``autocompress tune ARGV`` would be called with."""
    return TUNE.make_context("tune", list(argv))


def config(folder: Path, text: str) -> str:
    file = folder / "tune.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_the_choices_are_all_that_there_is():
    """The command line writes them out: it must not import torch for --help."""
    choices = {one.name: tuple(one.type.choices) for one in TUNE.params if hasattr(one.type, "choices")}
    assert choices["recovery"] == tuple(RECOVERIES)
    assert choices["sampler"] == SAMPLERS
    assert choices["optimizer"] == get_args(Optimizer)


def test_a_file_gives_options_and_what_is_typed_wins(tmp_path):
    text = 'scheme = "Prune"\nmax-drop = "2%"\ntrials = 3\n'
    file = config(tmp_path, text + 'timeout = 90\nepochs = 2.5\nquiet = true\nsampler = "grid"\n')
    params = parse("--config", file, "--trials", "5").params
    assert (params["scheme"], params["max_drop"], params["trials"]) == ("Prune", 0.02, 5)
    assert (params["timeout"], params["epochs"], params["quiet"], params["sampler"]) == (90.0, 2.5, True, "grid")
    assert params["drop"] == "absolute"  # not in the file


def test_underscores_will_do_and_a_number_is_a_fraction(tmp_path):
    assert parse("--config", config(tmp_path, "max_drop = 0.01\n")).params["max_drop"] == 0.01


def test_shares_are_percent_or_fractions_and_keep_to_their_range():
    params = parse("--tolerance", "5%", "--confidence", "0.99").params
    assert (params["tolerance"], params["confidence"]) == (0.05, 0.99)
    assert (parse().params["tolerance"], parse().params["confidence"]) == (0.15, 0.95)
    for option, value in (("tolerance", "0"), ("confidence", "95"), ("confidence", "50%"), ("tolerance", "nan")):
        with pytest.raises(click.BadParameter, match="is not between"):
            parse(f"--{option}", value)


def test_an_unknown_key_is_refused_with_the_nearest_option(tmp_path):
    with pytest.raises(click.BadParameter, match="'max-dorp', which is no option; did you mean 'max-drop'"):
        parse("--config", config(tmp_path, "max-dorp = 1\n"))
    with pytest.raises(click.BadParameter, match="'config', which is no option"):
        parse("--config", config(tmp_path, 'config = "other.toml"\n'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trials = ", "is not TOML"),
        ("trials = 0\n", "'--trials'"),
        ("trials = [1, 2]\n", "trials: [1, 2] is not a text or a number"),
        ("trials = true\n", "trials: True is not a text or a number"),
        ('quiet = "yes"\n', "quiet: 'yes' is not true or false"),
        ("[tune]\ntrials = 3\n", "'tune', which is no option"),
        ("timeout = 2026-11-20\n", "is not a text or a number"),
        ('max-drop = "lots"\n', "'--max-drop'"),
        ("max-drop = 1\n", "'--max-drop'"),
        ("max-drop = nan\n", "'--max-drop'"),
        ("epochs = nan\n", "'--epochs'"),
    ],
)
def test_a_bad_file_is_refused_in_words(tmp_path, text, said):
    with pytest.raises(click.ClickException) as caught:
        parse("--config", config(tmp_path, text))
    assert said in caught.value.format_message()


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(click.BadParameter, match="No such file"):
        parse("--config", str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(click.BadParameter, match="is not TOML"):
        parse("--config", str(tmp_path / "bytes.toml"))


def test_what_is_saved_gives_the_same_options_again(tmp_path):
    argv = ["--scheme", 'Prune(x="a\\b")', "--max-drop", "1.5%", "--timeout", "15m", "--epochs", "0.1", "--quiet"]
    once = parse(*argv, "--name", "mine", "--out", str(tmp_path / "räume"))
    write_config(once, tmp_path / "saved.toml")
    again = parse("--config", str(tmp_path / "saved.toml"))
    assert again.params == once.params | {"name": None}
    write_config(again, tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "saved.toml").read_bytes()


def test_what_trains_nothing_is_saved_without_settings_of_training(tmp_path):
    once = parse("--recovery", "none")
    check_shared(once, dict(once.params))
    write_config(once, tmp_path / "saved.toml")
    saved = tomllib.loads((tmp_path / "saved.toml").read_text())
    assert saved["recovery"] == "none" and not {"epochs", "optimizer", "distill"} & saved.keys()
    again = parse("--config", str(tmp_path / "saved.toml"), "--lr", "0.1")
    with pytest.raises(click.BadParameter, match="'none' trains nothing"):
        check_shared(again, dict(again.params))


def test_a_password_is_not_saved(tmp_path):
    context = parse("--tracking-uri", "http://me:secret@host:5000/?token=abc")
    write_config(context, tmp_path / "saved.toml")
    saved = tomllib.loads((tmp_path / "saved.toml").read_text())
    assert saved["tracking-uri"] == "http://host:5000/?token=..."


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(click.BadParameter, match="cannot write"):
        write_config(parse(), tmp_path / "none" / "saved.toml")


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
toml_keys = st.sampled_from([*options_of(TUNE), "max_drop", "tune", ""]) | texts


@st.composite
def toml_lines(draw: st.DrawFn) -> str:
    key = draw(toml_keys).replace("\\", "").replace('"', "")
    value = draw(
        st.one_of(
            st.integers().map(str),
            st.floats().map(lambda x: repr(x)),
            st.booleans().map(lambda x: repr(x).lower()),
            texts.map(lambda x: '"' + x.replace("\\", "\\\\").replace('"', '\\"') + '"'),
            st.sampled_from(
                ["[]", "[1, 'a']", "{}", "2026-11-20", "07:32:00", "'1%'", "'15m'", "", "0x10", "1_0"]
            ),
        )
    )
    return f'"{key}" = {value}'


@settings(max_examples=200, deadline=None)
@given(st.lists(toml_lines(), max_size=4))
def test_no_file_gives_a_traceback(tmp_path_factory, lines):
    file = config(tmp_path_factory.getbasetemp(), "\n".join(lines))
    try:
        params = parse("--config", file).params
    except click.ClickException as error:
        assert error.format_message()
    else:
        assert params["trials"] >= 1 and 0 <= params["max_drop"] < 1 and params["epochs"] > 0


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 99), st.floats(1e-3, 1e3))
def test_any_values_survive_being_saved(tmp_path_factory, scheme, trials, epochs):
    folder = tmp_path_factory.getbasetemp()
    once = parse("--scheme", scheme, "--trials", str(trials), "--epochs", repr(epochs))
    write_config(once, folder / "any.toml")
    assert parse("--config", str(folder / "any.toml")).params == once.params


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_that_completes(shell):
    done = CliRunner().invoke(
        cli, prog_name="autocompress", env={"_AUTOCOMPRESS_COMPLETE": f"{shell}_source"}, args=[]
    )
    assert done.exit_code == 0
    assert f"_AUTOCOMPRESS_COMPLETE={shell}_complete" in done.output


def test_names_of_studies_are_completed(recorded, tmp_path):
    recorded.write_study(tmp_path, "digits-a")
    env = {
        "_AUTOCOMPRESS_COMPLETE": "bash_complete",
        "COMP_WORDS": f"autocompress show --out {tmp_path} d",
        "COMP_CWORD": "4",
    }
    done = CliRunner().invoke(cli, prog_name="autocompress", env=env, args=[])
    assert done.output.splitlines() == ["plain,digits-a"]


@pytest.mark.parametrize("command", ["tune", "sweep"])
@pytest.mark.parametrize("option", ["--data", "--model", "--resume", "--device", "--tracking-uri", "--recovery"])
def test_an_option_without_a_value_is_not_taken_for_one_that_was_left_out(tmp_path, command, option):
    """As of a shell's variable that is not set: it would be the digits, or a study anew."""
    done = CliRunner().invoke(cli, [command, option, "", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert f"'{option}'" in done.output
    if option != "--recovery":  # which says what there is
        assert "it is empty; give a value, or leave it out" in " ".join(done.output.split())


@pytest.mark.parametrize("command", ["tune", "sweep", "list", "profile", "doctor"])
def test_an_out_without_a_value_is_not_the_current_folder(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, [command, "--out", ""])
    assert done.exit_code == 2
    assert "'--out'" in done.output and "it is empty; give a value, or leave it out" in " ".join(
        done.output.split()
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tune", "sweep"])
def test_the_help_has_every_option_under_a_heading(name: str) -> None:
    command = cli.commands[name]
    shown = CliRunner().invoke(command, ["--help"]).output
    assert all(f"\n{heading}:\n" in shown for heading in command.sections.values())
    assert "\nOptions:" not in shown
    assert all(option.opts[-1] in shown for option in command.params if isinstance(option, click.Option))


def test_options_of_tune_and_sweep_differ_only_in_what_they_run() -> None:
    tune, sweep = (
        {option.name: option.to_info_dict() for option in cli.commands[name].params} for name in ("tune", "sweep")
    )
    shared = tune.keys() & sweep.keys()
    assert {"out", "epochs", "recovery", "seed", "device", "model", "metric", "as_json", "quiet"} <= shared
    assert {name for name in shared if tune[name] != sweep[name]} == {"name", "resume", "verbose"}
    for name in ("name", "resume"):
        assert tune[name] | {"help": ""} == sweep[name] | {"help": ""}
