"""The arms: what each trains from what, what it costs, what it is. pytest tests/experiments/test_arms.py"""

import pytest

from inheritune.base.errors import UserError
from inheritune.experiments.arms import (
    ARMS,
    find_arm,
    impossible,
    inherit_flags,
    parse_arms,
    settings_hash,
)
from tests.experiments.comparison import common_of, write_config
from tests.tiny import ROOT, write_checkpoint


def test_arms_and_their_seeds():
    assert list(parse_arms("all")) == list(ARMS) and set(parse_arms("all:2").values()) == {2}
    assert parse_arms("random:3") == {"reference": 3, "random": 3}
    assert (
        parse_arms("all:1, inheritune:3")["reference"] == 3
        and parse_arms("all:1 kd:0 random:2")["random"] == 2
    )
    assert "kd" not in parse_arms("all:1 kd:0")
    assert parse_arms("inheritune_scaled:2")["reference_scaled"] == 2
    for text, message in (
        ("inheritun", "did you mean inheritune?"),
        ("kd:two", "'kd:two' is not NAME:SEEDS"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            parse_arms(text)


def test_every_arm_the_issue_names_is_there(tmp_path):
    c = common_of(write_config(tmp_path))
    stages = {name: arm.stages(c, name) for name, arm in ARMS.items()}
    # between --ckpt and --seed
    how = {name: [tuple(inherit_flags(s.start)[2:-2]) for s in found] for name, found in stages.items()}
    assert how["random"] == how["kd"] == [()] == how["reference"] == how["random_matched"]
    assert how["inheritune"] == how["kd_inherit"] == how["unseen"] == [("--layers", "2")]
    assert how["released_slice"] == [("--layers", "2", "--released_slice")]
    assert how["half_width"] == [("--recipe", "half_width")]
    for recipe in ("hybrid", "last", "middle", "alternate", "first_plus_last", "ends"):
        assert how[recipe] == [("--layers", "2", "--recipe", recipe)]
    assert how["attn"] == [("--layers", "2", "--parts", "attn")] and how["mlp"] == [
        ("--layers", "2", "--parts", "mlp")
    ]
    assert how["attn_mlp"] == [("--layers", "2", "--parts", "attn+mlp", "--layernorms", "False")]
    assert how["stacking"] == [(), ("--recipe", "stack", "--layers", "2")]
    assert stages["stacking"][1].start["ckpt"] == stages["stacking"][0].run + "/latest"
    assert how["rounds"] == [("--layers", "1"), ("--layers", "2")]
    assert how["onto"][1] == ("--layers", "2", "--onto", stages["onto"][0].run + "/latest")
    assert all(
        s.flags["data_end"] == 0.5 for name, found in stages.items() for s in found if name != "unseen"
    )
    assert (stages["unseen"][0].flags["data_start"], stages["unseen"][0].flags["data_end"]) == (0.5, 1.0)
    assert stages["random_2x"][0].steps == 12 and stages["random_2x"][0].flags["lr_decay_iters"] is None
    assert stages["kd"][0].flags["teacher"] == c.reference and "teacher" not in stages["inheritune"][0].flags
    assert stages["inheritune_scaled"][0].start["ckpt"].endswith("reference_scaled/run/latest")
    assert stages["reference_scaled"][0].flags["scale_attn_by_inverse_layer_idx"] is True


def test_costs_count_every_stage_and_the_teacher(tmp_path):
    c = common_of(write_config(tmp_path))
    small, large = c.random("x", 2).config.flops_per_token, c.config.flops_per_token
    assert c.reference_flops == large * 12 * 64 and c.reference_layer_steps == 48
    (matched,), (kd,) = (ARMS[name].stages(c, name) for name in ("random_matched", "kd"))
    pipeline = large * 12 * 64 + small * 6 * 64
    assert abs(matched.steps * matched.flops_per_step - pipeline) <= matched.flops_per_step / 2
    assert kd.flops_per_step == pytest.approx((small + large / 3) * 64)
    first, second = ARMS["stacking"].stages(c, "stacking")
    assert (first.layer_steps, second.layer_steps) == (6, 12)


def test_what_cannot_be_made_is_left_out(tmp_path):
    c = common_of(write_config(tmp_path, seen=1.0, layers=3))
    assert set(impossible(c)) == {"unseen", "stacking", "hybrid"}
    write_checkpoint(tmp_path / "given", n_layer=4, n_head=1)
    c = common_of(write_config(tmp_path, reference_config="", reference=str(tmp_path / "given")))
    gone = {"reference_scaled", "inheritune_scaled", "unseen", "random_matched", "half_width"}
    assert set(impossible(c)) == gone


def test_a_variant_is_an_arm_with_settings_of_its_own(tmp_path):
    c = common_of(write_config(tmp_path))
    assert list(parse_arms("ends@max_iters=3:2 random")) == ["reference", "random", "ends@max_iters=3"]
    (plain,), name = ARMS["ends"].stages(c, "ends"), "ends@max_iters=3@optimizer=muon"
    (stage,) = find_arm(name).stages(c, name)
    changed = {"max_iters": 3, "lr_decay_iters": None, "optimizer": "muon"}  # the schedule ends with the run
    assert stage.flags == plain.flags | changed and stage.start == plain.start
    assert stage.run == c.of(name) and find_arm(name).label.endswith(", 3 steps, Muon")
    (reference,) = find_arm("reference@optimizer=muon").stages(c, "reference@optimizer=muon")
    assert reference.flags["optimizer"] == "muon"
    assert settings_hash(c, name) != settings_hash(c, "ends@max_iters=3")
    fixed = ("ends@seed=3", "ends@stop_at_val_loss=1", "ends@dataset=elsewhere")
    for wrong in ("ends@max_itres=3", "ends@max_iters=x", "edns@max_iters=3", *fixed):
        with pytest.raises(UserError):
            parse_arms(wrong)


def test_where_a_run_is_made_is_not_what_it_is(tmp_path):
    path = write_config(tmp_path)
    machine = (
        "--threads=2",
        "--batch_size=4",
        "--compile=True",
        f"--out_dir={tmp_path}/elsewhere",
        "--jobs=1",
    )
    here = settings_hash(common_of(path), "kd")
    assert here == settings_hash(common_of(path, *machine), "kd")
    assert here != settings_hash(common_of(path, "--eval_interval=2"), "kd")
    assert here != settings_hash(common_of(path, "--max_iters=7"), "kd")


def test_hashes_of_the_committed_results_stay_the_same(monkeypatch):
    """Those of config/replicate_mini.py's rows; random_matched's needs the data."""
    monkeypatch.chdir(ROOT)
    hashes = {
        "reference": "09f1a5bc5a1e",
        "reference@optimizer=muon": "ef253e77766e",
        "random": "fb73be5d4a5e",
        "random@max_iters=500@optimizer=muon@learning_rate=8e-3": "ba33fa5b605c",
        "random_2x": "ef9643fa943d",
        "random_2x@optimizer=muon": "cfacbd591fb7",
        "inheritune": "9155bdd0053b",
        "inheritune@max_iters=500": "e39c7a89f9b3",
        "released_slice": "1ff996f44113",
        "half_width": "11e8e4ea36fe",
        "stacking": "5f5fa670e0a8",
        "hybrid": "fa79e359b6ff",
        "last": "3dca5c7a3803",
        "middle": "f80c84e67599",
        "alternate": "d67e8d2be165",
        "first_plus_last": "972996117c75",
        "ends": "de0db687c34a",
        "ends@max_iters=4000@optimizer=muon@learning_rate=8e-3": "330ddc7ef0e7",
        "kd": "124d0e49e397",
        "kd@kd_alpha=0.3": "3ab244b4c01a",
        "kd_inherit": "5f7b8cc9bd12",
        "kd_ends": "6026e5794c5f",
        "kd_ends@max_iters=1000": "ba96c47f3fad",
        "attn": "14bd102456f7",
        "mlp": "f17834a64c4b",
        "attn_mlp": "6bbf61712c95",
        "rounds": "42980a6df232",
        "onto": "6c1c47b86722",
        "reference_scaled": "04f8e5ad76f6",
        "inheritune_scaled": "d76774efe164",
    }
    variants = " ".join(name for name in hashes if "@" in name)
    c = common_of("config/replicate_mini.py", f"--arms=all:1 {variants}")
    assert hashes == {name: settings_hash(c, name) for name in hashes}
    c = common_of("config/replicate_mini.py", "--seen=0.5")
    assert settings_hash(c, "unseen") == "dded1bbba15c" and settings_hash(c, "random") == "c79e81b3753e"
