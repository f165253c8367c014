{
  # CMake is the one build. This target lets node-gyp, npm rebuild and electron-rebuild reach it.
  'targets': [
    {
      'target_name': 'pqblk',
      'type': 'none',
      'actions': [
        {
          'action_name': 'cmake_js',
          'inputs': [],
          'outputs': ['<(module_root_dir)/build/release/always'],
          'action': ['node', '<(module_root_dir)/scripts/build.mjs', 'native'],
        },
      ],
    },
  ],
}
