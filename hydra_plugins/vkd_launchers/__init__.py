"""vkd's launchers. Hydra imports this package at every start, so nothing heavy is imported here."""
