"""Errors as one line with an exit status."""

import errno
import traceback

from omegaconf import DictConfig

from engine.placement.process_group import is_lost_peer
from engine.placement.worker_link import Failure
from engine.settings.secrets import redact
from utils import UserError, is_out_of_memory

CRASH_NOTE = "traceback in "  # starts a note on an error; the path of its crash log follows


def as_user_error(error: Exception) -> UserError | None:
    """An error as one for users; None for internal errors."""
    if is_lost_peer(error):  # even if wrapped in a UserError
        reason = " ".join(str(error).split())
        fix = "see the errors of the other ranks; raise collective_timeout if one is only slow; continue with resume="
        return UserError("DISTRIBUTED", f"other ranks are lost or do not respond ({reason})", fix)
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else "no details"
        return UserError(
            "MEMORY",
            f"out of memory ({reason})",
            "a smaller token_budget, activation_checkpointing=true, mixed_precision=bfloat16 or a smaller max_length",
        )
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):
        problem = f"deterministic: {str(error).split()[0]}, an operation of this model, has no such form on a GPU"
        return UserError("CONFIG", problem, "set deterministic=false")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("STORAGE", f"the disk is full ({error})", "make room, then continue with resume=")
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE):
        problem = f"a file cannot be read or written ({error})"
        return UserError("STORAGE", problem, "check the disk and its permissions, then continue with resume=")
    return None


def as_failure(error: Exception, config: DictConfig) -> Failure:
    """The line and exit status for the error that ended a run or a rank."""
    is_consequence = is_lost_peer(error)
    user_error = as_user_error(error)
    if user_error is not None:
        return Failure(redact(str(user_error), config), user_error.exit_status, is_consequence)
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(CRASH_NOTE)]
    where = notes[0] if notes else traceback.format_exc()
    line = f"error[INTERNAL] {type(error).__name__}: {' '.join(str(error).split())}; {where}"
    return Failure(redact(line, config), 1, is_consequence)
