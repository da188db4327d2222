# What is frozen into dist/flanctl: the standard library, the packages, and how the interpreter starts. `make freeze` hands in
# DIST and DIST_SHA256 (our static CPython), STAGE (a folder of installed packages) and PACKAGES (their names, with commas).

def bytecode_only(policy, resource):
    # include_distribution_sources = False would drop the modules altogether, not just their source.
    if type(resource) == "PythonModuleSource":
        resource.add_source = False
        resource.add_include = resource.name.split(".")[0] not in LEFT_OUT

# Nothing here can be used in one file without a Python of its own, a screen or a second process of Python.
LEFT_OUT = ("idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "ensurepip", "venv", "distutils", "pydoc_data", "curses")

def make_exe():
    dist = PythonDistribution(
        flavor = "standalone",
        sha256 = VARS.get("DIST_SHA256"),
        local_path = VARS.get("DIST"),
    )

    policy = dist.make_python_packaging_policy()
    policy.resources_location = "in-memory"
    policy.extension_module_filter = "all"
    policy.include_distribution_sources = True
    policy.include_distribution_resources = False
    policy.include_non_distribution_sources = True
    policy.include_test = False

    # Level 2 strips the docstrings, and click takes its help texts from them.
    policy.bytecode_optimize_level_zero = False
    policy.bytecode_optimize_level_one = True
    policy.bytecode_optimize_level_two = False
    policy.register_resource_callback(bytecode_only)

    config = dist.make_python_interpreter_config()
    config.config_profile = "isolated"  # PYTHON* variables, user site and the current folder do not count
    config.optimization_level = 1
    config.module_search_paths = []
    config.filesystem_importer = False
    config.oxidized_importer = True
    config.site_import = False
    config.write_bytecode = False
    config.user_site_directory = False
    config.allocator_backend = "default"
    config.multiprocessing_start_method = "none"
    config.sys_frozen = True
    config.terminfo_resolution = "none"  # or every child process inherits a TERMINFO_DIRS of ours
    config.utf8_mode = True  # "isolated" ignores the locale: without this stdout is ASCII where LANG is not set
    config.install_signal_handlers = True  # "isolated" installs none: Ctrl-C would end it without a word and without clean-up
    config.parse_argv = False  # every argument is the program's
    # _frozen is a built-in module (packaging/executable/src/main.rs): it is there even where the modules are damaged.
    config.run_command = "import sys, _frozen; sys.excepthook = _frozen.unhandled; from flanctl.entry import main; main()"

    exe = dist.to_python_executable(
        name = "flanctl",
        packaging_policy = policy,
        config = config,
    )
    exe.add_python_resources(exe.read_package_root(
        path = VARS.get("STAGE"),
        packages = VARS.get("PACKAGES").split(","),
    ))
    return exe

def make_resources(exe):
    return exe.to_embedded_resources()

register_target("exe", make_exe)
register_target("resources", make_resources, depends = ["exe"], default = True)
resolve_targets()
