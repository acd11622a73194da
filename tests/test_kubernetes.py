"""The manifests in kubernetes/: their schema, and the command that each pod runs."""

import os
import subprocess
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer.main
from kubeflow_trainer_api import models
from pydantic import BaseModel

from baton.cli import app
from tests.docs_work import read_yaml
from training.config import OptimizerConfig
from training.engines.launch_file import check_launch_file
from training.engines.machines import Place, place_of
from training.recipe import load_recipe

KINDS = {"trainjob": "TrainJob", "runtime": "TrainingRuntime"}


def manifest(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml((root / "kubernetes" / f"{name}.yaml").read_text())
    return found


def unknown(value: Any, kind: Any, place: str = "") -> list[str]:
    """The keys of a value that a model of pydantic does not have; the models themselves ignore them."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
        wrong = [f"{place}.{key}" for key in value if key not in fields]
        return wrong + [
            key for name in value.keys() & fields for key in unknown(value[name], fields[name], f"{place}.{name}")
        ]
    if get_origin(kind) is list:
        return [key for n, one in enumerate(value) for key in unknown(one, get_args(kind)[0], f"{place}[{n}]")]
    if get_origin(kind) is dict:
        return []
    return [key for part in get_args(kind) if part is not type(None) for key in unknown(value, part, place)]


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_follows_the_schema(name, root):
    kind, value = getattr(models, f"TrainerV1alpha1{KINDS[name]}"), manifest(root, name)
    assert (value["apiVersion"], value["kind"]) == ("trainer.kubeflow.org/v1alpha1", KINDS[name])
    assert unknown(value, kind) == []
    kind.from_dict(value)  # checks the types of the values
    with pytest.raises(ValueError):
        kind.from_dict({**value, "spec": []})
    assert unknown({**value, "spec": {"trainers": {}}}, kind) == [".spec.trainers"]


def test_the_pods_run_baton_on_all_nodes(root, tmp_path):
    """What Kubeflow Trainer sets for torch becomes the options of `baton run`."""
    stub = tmp_path / "baton"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    trainer = manifest(root, "trainjob")["spec"]["trainer"]
    given = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"}
    environment = {**os.environ, **given, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [*trainer["command"], *trainer["args"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    run, *arguments = done.stdout.splitlines()
    assert run == "run"
    options = typer.main.get_command(app).commands["run"].make_context("run", arguments).params
    launch = root / options["launch"]
    check_launch_file(launch)
    load_recipe(root / options["recipe"], options["overrides"])
    keys = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
    assert place_of(launch, **{key: options[key] for key in keys}) == Place(2, 1, "job-node-0-0.job", 29400)
    assert options["max_restarts"] > 0


def test_job_and_runtime_fit_and_a_pod_has_time_to_save(root):
    job, runtime = manifest(root, "trainjob"), manifest(root, "runtime")
    ref = job["spec"]["runtimeRef"]
    assert (ref["kind"], ref["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    spec = runtime["spec"]["template"]["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > OptimizerConfig.model_fields["grace_seconds"].default
    container = pod["containers"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    shared = container["volumeMounts"][0]["mountPath"]
    assert f"output_root={shared}/" in job["spec"]["trainer"]["args"][0]
    assert spec["failurePolicy"]["maxRestarts"] > 0
