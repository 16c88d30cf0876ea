from configparser import ConfigParser
from setuptools import setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
settings = config['DEFAULT']

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    author=settings['author'],
    author_email=settings['author_email'],
    keywords=settings['keywords'],
    license='Apache-2.0',
    license_files=['LICENSE', 'pvtblip/vocab.NOTICE', 'pvtblip/models/*/NOTICE'],
    packages=['pvtblip'],
    package_data={'pvtblip': ['vocab.txt', 'vocab.NOTICE', 'models/*/*']},
    python_requires='>=' + settings['min_python'],
    install_requires=settings['requirements'].split(),
    extras_require={
        key.removesuffix('_requirements'): settings[key].split()
        for key in settings
        if key.endswith('_requirements')
    },
    entry_points={
        'console_scripts': settings['console_scripts'].split(),
        'nbdev': ['pvtblip=pvtblip._modidx:d'],
    },
    zip_safe=False,
)
