"""The warnings of a report: facts that limit the trust in its figures."""

from baton.report import evaluation, facts
from baton.report.collect import RunData, TaskResults
from baton.report.text import percent

_DROPS_WORTH_A_WARNING = 0.1
_STOPS_WORTH_A_WARNING = 0.9


def warnings(run: RunData) -> list[str]:
    """All warnings about the run."""
    found = list(run.problems)
    prints = {stage.name: stage.manifest.fingerprint for stage in run.stages if stage.manifest}
    for stage in run.published:
        assert stage.manifest is not None
        for parent in stage.manifest.parents.values():
            if parent.name in prints and parent.fingerprint != prints[parent.name]:
                found.append(
                    f"{stage.name} was made from another {parent.name} than the one that is here now; "
                    f"`{stage.origin.run(stage.name)}` makes it again"
                )
        for name in sorted({key for row in stage.metrics for key, value in row.items() if value != value}):
            found.append(f"{stage.name}: {name} was not a number in at least one step")
    for stage in run.stages:
        if stage.failed is not None:
            stays = "what was published before is shown here" if stage.manifest else "nothing of it is published"
            found.append(
                f"{stage.name} did not pass its gate: {'; '.join(stage.failed.reasons)}. The result is kept in "
                f"{stage.failed.path}; {stays}"
            )
    for account in facts.accounts(run):
        lost = sum(count for _, count in account.dropped)
        if account.used + lost != account.rows_in:
            found.append(f"{account.stage}, {account.label}: rows in are not rows used plus rows dropped")
        if account.rows_in and lost / account.rows_in > _DROPS_WORTH_A_WARNING:
            found.append(
                f"{account.stage}, {account.label}: {percent(lost / account.rows_in)} of the rows were dropped, "
                f"most because of: {account.dropped[0][0]}"
            )
    found += [f"{stage.name} {finding}" for stage in run.stages if stage.card for finding in stage.card.findings]
    for stage in run.published:
        assert stage.manifest is not None
        found += [f"{stage.name}, {alarm}" for alarm in stage.manifest.extra.get("alarms", [])]
        if stage.manifest.kind == "reward_model" and stage.card is None:
            found.append(f"{stage.name} has no report card: give it held-out pairs under eval_data, and run it again")
    found += _version_changes(run)
    for results in facts.all_results(run):
        found += _evaluation_warnings(run, results)
    return found


def _version_changes(run: RunData) -> list[str]:
    seen: dict[str, set[str]] = {}
    for stage in run.published:
        assert stage.manifest is not None
        for package, version in stage.manifest.versions.items():
            seen.setdefault(package, set()).add(version)
    return [
        f"the stages ran with different versions of {package}: {', '.join(sorted(versions))}"
        for package, versions in seen.items()
        if len(versions) > 1
    ]


def _evaluation_warnings(run: RunData, results: TaskResults) -> list[str]:
    found = []
    for model, metrics in results.metrics.items():
        stage = run.stage(model)
        tuned = stage is not None and stage.declared.answers != "no"
        if tuned and "stop_rate" in metrics and metrics["stop_rate"].value < _STOPS_WORTH_A_WARNING:
            share = percent(1 - metrics["stop_rate"].value)
            found.append(f"{model} does not stop by itself in {share} of its answers")
    for stage, parent in evaluation.gains(run, results):
        after, before = results.metrics[stage.name], results.metrics[parent]
        if {"reward", "gold"} <= after.keys() & before.keys():
            higher = after["reward"].value > before["reward"].value
            if higher and after["gold"].value < before["gold"].value:
                found.append(
                    f"{stage.name} raised the learned reward over {parent} but not the gold score: "
                    "it has found the reward model's mistakes (over-optimisation)"
                )
    return found
