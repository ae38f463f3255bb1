"""docs/production.md is run as far as it can be here, and what deploy/ holds fits the program."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from vllm_adafuse import __version__
from vllm_adafuse.cli.main import main
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving.options import check_options
from vllm_adafuse.tiny import make_tiny_backbone

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "production.md").read_text("utf-8")
COMMANDS = [
    shlex.split(line[2:])
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8")))


def of(program):
    found = [command for command in COMMANDS if program in command]
    assert found
    return found


def parsed(words):
    """Options of `vllm serve`, by its own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(words)


def test_every_command_is_looked_at():
    known = {"vllm-adafuse", "vllm", "curl", "docker", "kubectl", "promtool", "pipx"}
    programs = {next(word for word in command if "=" not in word) for command in COMMANDS}
    assert programs == known


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("production")
    base = make_tiny_backbone(root / "models" / "base")
    for version in (1, 2):
        make_random_adapter(base, root / "adapters" / "mix" / str(version), seed=version)
    return root


def test_our_own_commands_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    answer = {"choices": [{"prompt_token_ids": [5, 6], "token_ids": [7]}]}
    Path("answer.json").write_text(json.dumps(answer))  # of the command before it
    for command in of("vllm-adafuse"):
        if command[0] == "vllm-adafuse":
            assert main(command[1:]) == 0, capsys.readouterr().err


def test_servers_get_options_that_there_are():
    (command,) = of("vllm")
    options = parsed(["--model", *command[command.index("serve") + 1 :]])
    assert options.enable_lora and (options.max_loras, options.max_lora_rank) == (4, 128)
    assert [module.name for module in options.lora_modules] == ["mix"]
    assert check_options(options.additional_config) == []


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_servers_of_other_pages_get_options_that_there_are(page):
    from test_readme import commands

    found = [c for c in commands(ROOT / page, "vllm") if "serve" in c]
    assert len(found) >= 2
    for command in found:
        parsed(["--model", *command[command.index("serve") + 1 :]])


def test_requests_are_those_of_the_api():
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.lora.protocol import (
        LoadLoRAAdapterRequest,
        UnloadLoRAAdapterRequest,
    )

    kinds = {
        "/v1/completions": CompletionRequest,
        "/v1/load_lora_adapter": LoadLoRAAdapterRequest,
        "/v1/unload_lora_adapter": UnloadLoRAAdapterRequest,
    }
    seen = set()
    for command in of("curl"):
        path = next(word for word in command if word.startswith("localhost:8000"))[14:]
        seen.add(path)
        if path != "/metrics":
            body = json.loads(command[command.index("-d") + 1])
            made = kinds[path](**body)
            assert body.keys() <= type(made).model_fields.keys()
    assert seen == {*kinds, "/metrics"}


def test_files_that_the_rest_names_are_there():
    for command in COMMANDS:
        for word in command:
            if word.startswith("deploy/"):
                assert (ROOT / word).is_file()
    for name in re.findall(r"`(deploy/[\w./-]+)`", PAGE):
        assert (ROOT / name).is_file()


def test_the_page_lists_the_metrics():
    from test_metrics import asked, known_metrics

    table = PAGE[PAGE.index("| metric |") :].partition("\n\n")[0]
    assert asked(table) | {"adafuse_adapter_load_seconds_count"} == known_metrics()


def vllm_variables():
    from vllm import envs

    return set(envs.environment_variables)


def test_the_manifests_fit_together():
    kinds = {one["kind"]: one for one in MANIFESTS}
    pod = kinds["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = parsed(container["args"])
    assert options.enable_lora and check_options(options.additional_config) == []
    assert container["image"] == f"vllm-adafuse:{__version__}"
    assert f"vllm-adafuse:{__version__}" in PAGE
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert container["securityContext"]["readOnlyRootFilesystem"]
    written = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
    assert written == ["/cache", "/cache/tmp", "/dev/shm"]
    labels = pod["metadata"]["labels"]
    selectors = [
        kinds["Deployment"]["spec"]["selector"]["matchLabels"],
        kinds["Service"]["spec"]["selector"],
        kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    read = [f"{m['mountPath']}/" for m in container["volumeMounts"] if m.get("readOnly")]
    paths = [path for word in container["args"] for path in re.findall(r"=(/\S+)", word)]
    assert len(paths) == 2 and all(path.startswith(tuple(read)) for path in paths)
    (port,) = container["ports"]
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert probes == [{"path": "/health", "port": port["name"]}] * 3
    (allowed,) = kinds["NetworkPolicy"]["spec"]["ingress"]
    assert allowed["ports"] == [{"port": port["name"]}]
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    scraped = {f"prometheus.io/{key}": value for key, value in
               (("scrape", "true"), ("port", str(port["containerPort"])), ("path", "/metrics"))}  # fmt: skip
    assert pod["metadata"]["annotations"] == scraped
    (scraper,) = [who for who in allowed["from"] if "namespaceSelector" in who]
    assert scraper["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    assert {variable["name"] for variable in container["env"]} <= vllm_variables()


def test_the_image_writes_where_the_manifest_lets_it():
    text = (ROOT / "deploy" / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    words = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    known = {"ARG", "FROM", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE"}
    assert {word for word, _ in words} == known
    (env,) = [rest for word, rest in words if word == "ENV"]
    paths = [pair.partition("=")[2] for pair in env.split() if "=/" in pair]
    assert len(paths) >= 5 and all(path.startswith("/cache") for path in paths)
    user = next(rest for word, rest in words if word == "USER")
    deployment = next(one for one in MANIFESTS if one["kind"] == "Deployment")
    assert user.split(":")[0] == str(
        deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    )
    copied = next(rest for word, rest in words if word == "COPY").split()[0]
    assert copied == "dist/vllm_adafuse-*.whl"
    assert any(rest == "vllm-adafuse doctor" for word, rest in words if word == "RUN")
    names = {pair.partition("=")[0] for pair in env.split() if pair.startswith("VLLM_")}
    assert names and names <= vllm_variables()


PROMTOOL = shutil.which("promtool") or ""


@pytest.mark.skipif(not PROMTOOL, reason="no promtool on this machine")
def test_promtool_takes_the_rules_and_every_query_of_the_dashboard(tmp_path):
    board = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text("utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 5
    # Grafana's own variables are times, the others patterns of labels.
    plain = [re.sub(r"\$\w+", ".+", re.sub(r"\$__\w+", "5m", query)) for query in queries]
    rules = [{"record": f"panel:query{i}", "expr": query} for i, query in enumerate(plain)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}))
    for file in (tmp_path / "rules.yaml", ROOT / "deploy" / "prometheus-rules.yaml"):
        done = subprocess.run([PROMTOOL, "check", "rules", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
