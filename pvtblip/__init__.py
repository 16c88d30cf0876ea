"Learn image captioning by building it; use what you built."
__version__ = "0.1.0"

_HOME = {'load_model': 'fast', 'process_image': 'generation', 'generate_caption': 'generation'}
__all__ = list(_HOME)


def __getattr__(name):
    "Import the public names when they are asked for, so that `import pvtblip` itself stays light."
    if name not in _HOME: raise AttributeError(f"module 'pvtblip' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'pvtblip.{_HOME[name]}'), name)


def __dir__(): return sorted([*globals(), *__all__])
