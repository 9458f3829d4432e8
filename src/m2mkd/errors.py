"""Errors that a user can fix. Each message names the value, the rule and the way out."""


class M2MKDError(Exception):
    """Error that a user can fix. The command line prints only its message, without a traceback."""


class RecipeError(M2MKDError, ValueError):
    """A recipe, or a value given on the command line, is wrong; the message names the key."""


class DataError(M2MKDError, ValueError):
    """A data set cannot be loaded or does not fit; the message names it."""


class StageError(M2MKDError, ValueError):
    """A model cannot be loaded or cut as asked, or networks cannot be stitched."""


class PairFileError(M2MKDError, ValueError):
    """A pair's folder is missing, damaged, or belongs to another student."""


class CacheError(M2MKDError, ValueError):
    """A cache of targets is missing, damaged, or belongs to another teacher or data set."""


class ConversionError(M2MKDError, ValueError):
    """An official checkpoint, or its configuration, is not what it should be."""


class HubError(M2MKDError, ValueError):
    """A folder cannot be exported, pushed or fetched as asked."""


class WriteError(M2MKDError, RuntimeError):
    """A file or folder cannot be written, usually because the disk is full."""


class RunError(M2MKDError, RuntimeError):
    """A run cannot go on, or its results cannot be read. Finished phases are kept."""


class NonFiniteError(M2MKDError, RuntimeError):
    """A loss or a gradient is not finite; training stopped before it reached the weights."""
