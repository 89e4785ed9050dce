"""Options: every name, default, meaning and check, once, as frozen dataclasses; and the ways to write them.

Each option is a dataclass field made by `fields.option`. Other spellings live on the class they belong to: `ALIASES`
(old name -> real name, both relative to the class) and `NO_EFFECT` (accepted name -> why it means nothing here).
"""
