# SPDX-License-Identifier: Apache-2.0
"""Texts of environment files, and what systemd makes of each: our reader and systemd are held to them."""

from __future__ import annotations

from collections.abc import Mapping

#: Text -> the variables that a unit with this ``EnvironmentFile=`` has.
TEXTS: Mapping[str, Mapping[str, str]] = {
    "A=1": {"A": "1"},
    "A=1\nA=2\n": {"A": "2"},
    "# c\n; c\n\n  A=1  \nB='x y'\nC=\"q\"\nD=\n": {"A": "1", "B": "x y", "C": "q", "D": ""},
    "A = 1\nB= 2 \n\tC\t=\t3\n": {"A": "1", "B": "2", "C": "3"},
    "A=1 # no comment\nB=x;y\n": {"A": "1 # no comment", "B": "x;y"},
    "A='it''s'\nB=\"a\" \"b\"\nC='a' b \nD=a 'b'\n": {"A": "its", "B": "ab", "C": "ab", "D": "a 'b'"},
    "A=' x '\nB=\" x \" \nC=\\ x\\ \n": {"A": " x ", "B": " x ", "C": " x "},
    'A="\\"\\\\\\`\\$\\n\\x"\nB=\\n\\"\nC=\'\\n\'\n': {"A": '"\\`$\\n\\x', "B": 'n"', "C": "\\n"},
    "A=one\\\ntwo\nB=\"one\\\ntwo\"\nC='one\\\ntwo'\n": {"A": "onetwo", "B": "onetwo", "C": "one\\\ntwo"},
    'A="one\ntwo"\nB=3\n': {"A": "one\ntwo", "B": "3"},
    "# a comment \\\nA=1\nB=2\n": {"B": "2"},
    "what is this\nA=1\nand that": {"A": "1"},
    "export A=1\n1A=1\nA-B=1\n=1\nC=1\n": {"C": "1"},
    "A='open\nB=2\n": {"A": "open\nB=2\n"},
    'A="open\\': {"A": "open"},
    "A=$HOME/%i\nB=~\n": {"A": "$HOME/%i", "B": "~"},
    "A=\"a\tb\"\nB='\x01'\nC=3\n": {"A": "a\tb", "B": "\x01", "C": "3"},
    "A=1\r\nB=2\r\n": {"A": "1", "B": "2"},
    "A=grün\n": {"A": "grün"},
    "A=x\\": {"A": "x"},
    "A=['a', \"b\"]\n": {"A": "['a', \"b\"]"},
    "": {},
}
