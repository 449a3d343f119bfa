"""Independent restatements of mixlab's methods in float64 NumPy, one module a family.

They are written from papers and specifications, never from the code under test, and import nothing
of it. The tests beside them hold them against vectors recorded from the reference implementations,
where those are present; the packages' `test_*against_reference.py` hold mixlab against them.
"""
