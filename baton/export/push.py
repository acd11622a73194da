"""`baton push`: exports a stage's model as a directory with its card, and uploads it to the hub in one commit."""

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from baton.export.evaluations import failed_gates
from baton.export.run import export_source
from baton.export.source import Source
from handoff.errors import HandoffError, UserError
from handoff.files import quoted

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push(
    target: str,
    repository: str,
    to: str,
    dtype: str | None,
    say: Callable[[str], None],
    *,
    public: bool = False,
    check: bool = True,
) -> str:
    """Uploads a model. Returns the address of the commit.

    Args:
        target: as for `export`.
        repository: `ORG/NAME`; it is made if it is not there, private unless `public`.
        to, dtype, say, check: as for `export_source`.

    Raises:
        UserError: the name is none, or there is no token.
        HandoffError: a gate failed, the export failed, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"{quoted(repository)} is no name of a repository; write ORGANISATION/NAME")
    source = Source.open(target)
    failed = failed_gates(source.parent)
    if failed:
        raise HandoffError(
            f"{source.parent.path} did not pass the gate of its evaluation, so it is not published: "
            f"{'; '.join(failed[:3])}{' …' if len(failed) > 3 else ''}"
        )
    if get_token() is None:
        raise UserError("there is no token for the hub: `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    with TemporaryDirectory(prefix="baton-push-") as place:
        folder = export_source(source, to, dtype, Path(place) / "model", say, check=check)
        return _upload(api, repository, folder, source.parent.fingerprint, public=public)


def _upload(api: "object", repository: str, folder: Path, fingerprint: str, *, public: bool) -> str:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(api, HfApi)
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload the model {fingerprint[:12]}"
        )
    except HfHubHTTPError as error:
        code = None if error.response is None else error.response.status_code
        if code in (401, 403):
            raise HandoffError(
                f"{repository}: the hub refuses the token ({code}): it is wrong, or may not write there; nothing was "
                "published. `hf auth login` with one that may"
            ) from error
        raise HandoffError(
            f"{repository}: the hub refuses the upload: {quoted(' '.join(str(error).split()))}"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise HandoffError(
            f"{repository}: the hub cannot be reached ({type(error).__name__}); nothing was published, try again"
        ) from error
    return str(done.commit_url)
