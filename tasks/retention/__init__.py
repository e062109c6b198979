"""Text suites for `mmpeft retain`, as lm-eval reads them; README.md describes each."""
