"""The errors that a user can do something about. Each message names the value, the rule and the way out."""


class M2MKDError(Exception):
    """What a user can fix; the command line prints the message only, without a traceback."""


class RecipeError(M2MKDError, ValueError):
    """A recipe, or a value given on the command line, is wrong; the message names the key."""


class DataError(M2MKDError, ValueError):
    """A data set cannot be had, or does not fit; the message names it."""


class StageError(M2MKDError, ValueError):
    """A model cannot be loaded or cut, or networks cannot be stitched, as asked."""


class PairFileError(M2MKDError, ValueError):
    """A pair's folder is missing, damaged, or belongs to another student."""


class ConversionError(M2MKDError, ValueError):
    """An official checkpoint, or its configuration, is not what it should be."""


class HubError(M2MKDError, ValueError):
    """A folder cannot be exported, pushed or fetched as asked."""


class WriteError(M2MKDError, RuntimeError):
    """A file or folder cannot be written: a full disk, above all."""


class RunError(M2MKDError, RuntimeError):
    """A run cannot go on, or its results cannot be read. Finished phases are kept."""


class NonFiniteError(M2MKDError, RuntimeError):
    """A loss or a gradient is not finite; training stopped before the weights took it."""
