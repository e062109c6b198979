if __name__ != "mmpeft.configs":
    raise ImportError("import this package as mmpeft.configs")
