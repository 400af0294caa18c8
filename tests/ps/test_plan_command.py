"""`zero-ps plan`: parameters from configurations, what a step asks of each resource, what the command says."""

import json
from dataclasses import replace

import pytest
from torch import nn

from ps.cli import main
from ps.tools import hf_config
from ps.tools.capacity import CHUNK_SECONDS, WORKING_BYTES, Cluster, estimate, servers_needed
from ps.tools.hf_config import ModelSize
from trainer.app.gpt import GPT, GPTConfig

LLAMA = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip

# As their publishers and `transformers` count them.
KNOWN = [
    (LLAMA, 70_553_706_496),
    ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}, 124_439_808),
    (
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    (
        {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        46_702_792_704,
    ),
    (
        {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    (
        {
            "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        },
        8_190_735_360,
    ),
    # Keys and values are of 8 heads if a file does not say.
    (
        {
            "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32000,
        },
        7_241_732_096,
    ),
]  # fmt: skip

CLUSTER = Cluster(
    servers=4,
    server_memory=1e15,
    server_cores=10,
    server_network=10e9,
    disk_read=4e9,
    disk_write=2e9,
    hosts=2,
    trainers=8,
    host_network=20e9,
    interconnect=50e9,
    flops=1e14,
    live=1e9,
)
MODEL = ModelSize(int(1e10), int(1e10), int(1e8))


def seconds(cluster: Cluster, tokens: int = 1000) -> dict[str, float]:
    return {demand.resource: demand.seconds for demand in estimate(MODEL, tokens, cluster).demands}


@pytest.mark.parametrize(("config", "parameters"), KNOWN, ids=lambda value: str(value)[:40])
def test_parameters_of_known_models(tmp_path, config, parameters):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert hf_config.read(file).parameters == parameters


@pytest.mark.parametrize(
    ("base", "changed", "added"),
    [
        (KNOWN[1][0], {"tie_word_embeddings": False}, 50257 * 768),
        (LLAMA, {"tie_word_embeddings": True}, -128256 * 8192),
        (LLAMA, {"mlp_bias": True}, 80 * (2 * 28672 + 8192)),
        (LLAMA, {"attention_bias": True}, 80 * (8192 + 2 * 1024 + 8192)),
    ],
)
def test_what_a_configuration_may_add(tmp_path, base, changed, added):
    found = []
    for config in (base, {**base, **changed}):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config))
        found.append(hf_config.read(file).parameters)
    assert found[1] - found[0] == added


def test_experts_that_a_token_does_not_use_cost_no_compute(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(KNOWN[3][0]))
    found = hf_config.read(file)
    assert 12.8e9 < found.active < 13e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"model_type": "bert"}', "model_type 'bert'"),
        ("[]", "model_type None"),
        ('{"model_type": "llama", "hidden_size": 8}', "lacks 'num_hidden_layers'"),
        ('{"model_type": "gpt2", "n_embd": null, "n_layer": 2}', "has n_embd = None, which is not a whole number"),
        ('{"model_type": "gpt2", "n_embd": 0, "n_layer": 2}', "has n_embd = 0"),
        ('{"model_type": "gpt2", "n_embd": -8, "n_layer": 2}', "has n_embd = -8"),
        ('{"model_type": "gpt2", "n_embd": 1e400, "n_layer": 2}', "has n_embd = inf"),
        ('{"model_type": "gpt2", "n_embd": "wide", "n_layer": 2}', "has n_embd = 'wide'"),
        ('{"model_type": "gpt2", "n_embd": true, "n_layer": 2}', "has n_embd = True"),
        (json.dumps({**LLAMA, "num_attention_heads": 0}), "has num_attention_heads = 0"),
        (json.dumps({**LLAMA, "head_dim": "x"}), "has head_dim = 'x'"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_known_configuration_is_said_to_be_none(tmp_path, capsys, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    assert main(["plan", "--config", str(file), "--tokens", "1M"]) == 2
    assert message in capsys.readouterr().err


def test_one_copy_of_the_model_leaves_the_servers_in_group_mode():
    one, eight = seconds(replace(CLUSTER, trainers=1)), seconds(CLUSTER)
    assert one["network of a server, out"] == eight["network of a server, out"]
    direct = seconds(replace(CLUSTER, group=False))
    assert direct["network of a server, out"] == pytest.approx(8 * eight["network of a server, out"])
    assert "between trainers" not in direct


def test_amounts_are_those_of_the_arithmetic():
    found = seconds(CLUSTER, tokens=10**6)
    # 20 GB in bf16, of which 1 GB stays for the backward.
    assert found["network of a server, out"] == pytest.approx((20e9 + 19e9) / 4 / 10e9)
    assert found["network of a server, in"] == pytest.approx(20e9 / 4 / 10e9)
    assert found["compute of a trainer"] == pytest.approx(6 * 1e10 * 1e6 / 8 / 1e14)
    assert found["disk of a server"] == 0


def test_what_does_not_fit_moves_from_and_to_the_disk_in_each_step():
    # 2.5 G parameters a server, 18 bytes each; half of it fits beside what is being worked on.
    found = estimate(MODEL, 1000, replace(CLUSTER, server_memory=22.5e9 + WORKING_BYTES))
    assert found.on_disk == pytest.approx(0.5)
    # State, what is pulled, and a gradient; state, the copy for pulls, and a gradient.
    assert found.disk_read == pytest.approx(2.5e9 * 0.5 * (12 + 2 * 1.95 + 2))
    assert found.disk_written == pytest.approx(2.5e9 * 0.5 * (12 + 2 + 2))
    disk = next(demand for demand in found.demands if demand.resource == "disk of a server")
    assert disk.amount == pytest.approx(found.disk_read + found.disk_written)
    assert disk.seconds == pytest.approx(found.disk_read / 4e9 + found.disk_written / 2e9)


def test_a_model_of_many_small_tensors_takes_more_python():
    few, many = (
        {demand.resource: demand.seconds for demand in estimate(replace(MODEL, tensors=n), 1000, CLUSTER).demands}
        for n in (0, 10**5)
    )
    assert few["Python of a server"] == pytest.approx(5000 / 4 * CHUNK_SECONDS[0])
    assert many["Python of a server"] == pytest.approx(10**5 / 4 * CHUNK_SECONDS[0])


def test_on_one_machine_trainers_and_servers_share_its_cores():
    apart, together = (
        {d.resource: d for d in estimate(MODEL, 10**6, replace(CLUSTER, one_machine=cores)).demands}
        for cores in (0, 16)
    )
    assert "processors of the machine" not in apart
    compute = 6 * 1e10 * 1e6 / 1e14 * 16 / 8
    of_servers = 4 * together["processor of a server"].amount
    # And what the trainers' side of the links takes.
    shared = together["processors of the machine"]
    python = 1e10 / 2e6 * CHUNK_SECONDS[1]
    assert shared.amount == pytest.approx(compute + of_servers + (39 * 0.36 + 20 * 0.34) + python)
    assert shared.rate == 16


def test_the_servers_that_are_needed_are_the_fewest():
    slow = replace(CLUSTER, server_network=1e9, hosts=8)
    needed = servers_needed(MODEL, 10**4, slow)
    assert needed is not None
    enough = estimate(MODEL, 10**4, replace(slow, servers=needed))
    assert enough.bottleneck.where != "servers"
    assert estimate(MODEL, 10**4, replace(slow, servers=needed - 1)).bottleneck.where == "servers"


def test_the_command_names_the_bottleneck_and_what_removes_it(capsys):
    servers = ["--servers", "2", "--server-memory", "2TB", "--server-network", "1GB"]
    assert main(["plan", "--parameters", "70B", "--tokens", "100k", *servers]) == 0
    text = capsys.readouterr().out
    assert "the bottleneck is network of a server, out" in text and "servers remove it" in text
    assert main(["plan", "--parameters", "70e9", "--tokens", "4M", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bottleneck"] == "compute of a trainer" and document["servers_needed"] <= 8


@pytest.mark.parametrize(
    "flags", [["--parameters", "many"], ["--parameters", "-1"], ["--parameters", "7B", "--servers", "0"]]
)
def test_wrong_numbers_are_refused_in_one_line(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *flags, "--tokens", "1M"])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_small_submodule_limit_is_noted():
    measured = replace(CLUSTER, server_network=1e9)
    (note,) = estimate(MODEL, 1000, replace(measured, live=1e8)).notes
    assert "100 M parameters" in note
    assert not estimate(MODEL, 1000, measured).notes


def test_rates_that_nobody_measured_are_noted():
    (note,) = estimate(MODEL, 1000, CLUSTER).notes
    assert "1.9 GB/s over gloo" in note


def test_the_demo_model_is_counted_as_gpt2_counts(tmp_path):
    """A check against a real module: same blocks, learned positions, tied output."""
    config = GPTConfig(layers=2, width=32, heads=4, context=64, tied=True)
    model: nn.Module = GPT(config)
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_positions": 64, "vocab_size": 256})
    )
    assert hf_config.read(file).parameters == sum(parameter.numel() for parameter in model.parameters())
