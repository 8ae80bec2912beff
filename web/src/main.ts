/// The page: a balloon, a string, and a slider that really pulls it.

import { mount } from 'svelte'
import 'uplot/dist/uPlot.min.css'
import './app.css'
import App from './App.svelte'
import { forgetToken } from './lib/route.svelte'

forgetToken()
mount(App, { target: document.getElementById('app')! })
