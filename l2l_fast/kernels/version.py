"""The version of the package; the one place. The build writes it into the compiled extension too."""

VERSION = "0.2.0"
