if __name__ != "mmpeft.demos":
    raise ImportError("import this package as mmpeft.demos")
